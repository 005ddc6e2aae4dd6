"""A transport for sharded tensors: each rank of the trainer fills buckets for the ranks of engines beside it.

Rank 0 plans the exchange, leads it, and tells the engines where each rank's bucket is.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from millrace.buckets import (
    CudaIpcBucket,
    PartsBucket,
    RankBucket,
    SharedMemoryBucket,
    TensorPart,
    TorchStorageBucket,
)
from millrace.errors import EngineError
from millrace.extension.millrace_samples import separated
from millrace.types import Capability
from millrace.weights.sharded import LedTensors, ask_places, begin_exchange, end_exchange, fill_buckets
from millrace.weights.shards.apart import ApartTransport, begin_apart
from millrace.weights.shards.exchange import Exchange, Filled, RankPlace
from millrace.weights.shards.filling import labels
from millrace.weights.shards.leading import parts_of, require, require_equal, spec_of, to_its_end
from millrace.weights.shards.plans import PLANS, EngineRank, Plans
from millrace.weights.shards.schedule import Round
from millrace.weights.shards.views import NotExchangeable
from millrace.weights.sidecar.messages import FORMS
from millrace.weights.source import WeightSource
from millrace.weights.step import StepResult
from millrace.weights.transports.base import (
    ExchangedBucket,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    Transport,
)
from millrace.weights.transports.cuda_ipc import CudaIpcTransport
from millrace.weights.transports.gpus import VisibleGpus
from millrace.weights.transports.process_group import GlooTransport, NcclTransport, ProcessGroupTransport
from millrace.weights.transports.shared_memory import SharedMemoryTransport
from millrace.weights.transports.torch_storage import TorchStorageTransport

Memory = TorchStorageBucket | SharedMemoryBucket | CudaIpcBucket

logger = logging.getLogger(__name__)

EXCHANGED = (TorchStorageTransport, SharedMemoryTransport, CudaIpcTransport, GlooTransport, NcclTransport)


class ExchangeTransport(Transport):
    """Brings one version. It takes no tensors from the publisher.

    ranks: of each engine, by the engine's name. plans: of the fleet; what is made of the schedule is kept there.
    """

    samples_buckets = loads_ahead = True

    def __init__(
        self, led: LedTensors, exchange: Exchange, ranks: Mapping[str, Sequence[EngineRank]], plans: Plans
    ) -> None:
        self._led, self._exchange, self._ranks, self._plans = led, exchange, ranks, plans
        self._views = exchange.schedule.views
        self._loading = set(ranks)  # the engines that have not failed

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:  # noqa: ARG002
        specs = self._plans.once("specs", lambda: {view.name: spec_of(view) for view in self._views})
        for number, one in enumerate(self._exchange.schedule.rounds):
            # A share that no rank opens would keep the memory, so engines that have failed get none.
            loading = {name: ranks for name, ranks in self._ranks.items() if name in self._loading}
            shares = [0] * self._exchange.schedule.ranks
            numbered = {name: [(rank, _next(shares, rank.beside)) for rank in ranks] for name, ranks in loading.items()}
            filled = fill_buckets(self._led, self._exchange, number, shares)
            tensors = tuple(specs[name] for name in one.names)
            made = {
                name: PartsBucket(
                    tuple(
                        RankBucket(memory_of(one, rank, filled[rank.beside], share), self._parts(number, name, index))
                        for index, (rank, share) in enumerate(ranks)
                    ),
                    tensors,
                )
                for name, ranks in numbered.items()
            }
            yield ExchangedBucket(
                lambda target, made=made: made[target.engine.name],  # type: ignore[misc]
                {},
                one.names,
                sum(spec.nbytes for spec in tensors),
                sum(of_rank.exchanged for of_rank in filled),
                samples=lambda number=number, filled=filled: partial(self._samples, number, filled),  # type: ignore[misc]
            )

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        results = await super().load(targets, staged, deadline=deadline)
        self._loading = {name for name, result in results.items() if result.error is None}
        return results

    async def close(self) -> None:
        await to_its_end(end_exchange, self._led, self._exchange)

    def _parts(self, number: int, engine: str, index: int) -> tuple[TensorPart, ...]:
        rank = self._ranks[engine][index]
        return self._plans.once((number, engine, index), partial(parts_of, self._exchange.schedule, number, rank))

    def _samples(self, number: int, filled: Sequence[Filled]) -> dict[str, str]:
        """Return the sampled checksums of the parts in all ranks' buckets of a round, by the parts' labels."""
        samples: dict[str, str] = {}
        for rank, of_rank in enumerate(filled):
            names = self._plans.once((number, rank), partial(self._labels, number, rank))
            samples.update(zip(names, separated(of_rank.samples), strict=True))
        return samples

    def _labels(self, number: int, rank: int) -> list[str]:
        schedule = self._exchange.schedule
        return labels(schedule, schedule.rounds[number].bucket(rank, schedule.ranks))


async def exchanging(
    source: WeightSource, targets: Sequence[PublishTarget], transport: Transport, *, bucket_bytes: int, deadline: float
) -> ExchangeTransport | ApartTransport | None:
    """Return a transport by which the trainer's ranks exchange the parts of `source` that the engines need, or send
    them to engines that are apart. It is used once instead of `transport`, and closed. None if the tensors must be
    gathered; the log says why.

    bucket_bytes: half of the memory that a rank may use besides its shards. deadline: seconds for the engines to say
    what they need. Raises PublishError if a rank has no room, or as iterating over the source does.
    """
    led = source.led
    if not isinstance(led, LedTensors) or not isinstance(transport, EXCHANGED):
        return None
    try:
        begun: ExchangeTransport | ApartTransport
        if isinstance(transport, ProcessGroupTransport):
            begun = await begin_apart(led, source, targets, transport, bucket_bytes, deadline)
        else:
            begun = await _begin(led, source, targets, transport, bucket_bytes, deadline)
        logger.info("each of the trainer's ranks sends the parts that it has, without a gather")
        return begun
    except (NotExchangeable, EngineError) as error:
        logger.info("the trainer's ranks gather the weights, because %s", error)
        return None


async def _begin(
    led: LedTensors,
    source: WeightSource,
    targets: Sequence[PublishTarget],
    transport: Transport,
    bucket_bytes: int,
    deadline: float,
) -> ExchangeTransport:
    require(Capability.UPDATE_FROM_PARTS, targets)
    ends, on_gpus = time.monotonic() + deadline, isinstance(transport, CudaIpcTransport)
    plans = PLANS.setdefault(transport, Plans())
    views = await to_its_end(plans.views, source, led.sharded.tensors)
    ranks = await to_its_end(ask_places, led)
    beside = {target.engine.name: beside_each(target, ranks, on_gpus=on_gpus) for target in targets}
    specs = [spec_of(view) for view in views]
    needs = [await target.engine.needed_parts(specs, deadline=ends - time.monotonic()) for target in targets]
    require_equal(needs)
    engine_ranks = {
        name: [EngineRank(place, needed) for place, needed in zip(places, needs[0], strict=True)]
        for name, places in beside.items()
    }

    (capability,) = transport.needs

    def begin() -> ExchangeTransport:
        schedule = plans.schedule(views, ranks, engine_ranks, bucket_bytes)
        return ExchangeTransport(led, begin_exchange(led, schedule, FORMS[capability]), engine_ranks, plans)

    return await to_its_end(begin)


def beside_each(target: PublishTarget, ranks: Sequence[RankPlace], *, on_gpus: bool) -> list[int]:
    """Return the trainer's rank beside each rank of an engine: on the same GPU or, on the CPU, on this host.

    Raises NotExchangeable if there is none.
    """
    name, info = target.engine.name, target.info
    if any((rank.gpu is not None) != on_gpus for rank in ranks):
        raise NotExchangeable(
            f"{name} is {'on' if on_gpus else 'not on'} GPUs, and the trainer's tensors are elsewhere"
        )
    if not on_gpus:
        here = [number for number, rank in enumerate(ranks) if rank.host == ranks[0].host]
        return [here[number % len(here)] for number in range(info.ranks)]
    visible = VisibleGpus.here()
    uuids = [visible.uuids[index] for index in visible.indices(info.gpus)]
    on = {rank.gpu: number for number, rank in reversed(list(enumerate(ranks))) if rank.host == ranks[0].host}
    if len(uuids) != info.ranks or not on.keys() >= set(uuids):
        raise NotExchangeable(f"not every rank of {name} is on a GPU of one of the trainer's ranks")
    return [on[uuid] for uuid in uuids]


def memory_of(one: Round, rank: EngineRank, filled: Filled, share: int) -> Memory:
    """Return the bucket of a round as a rank of an engine opens it. share: the number of its handle."""
    memory = filled.handle.bucket((), max(one.nbytes(rank.beside), 1), share, 1)  # engines open no empty memory
    assert isinstance(memory, TorchStorageBucket | SharedMemoryBucket | CudaIpcBucket)
    return memory


def _next(counts: list[int], index: int) -> int:
    """Count one more, and return how many there were before."""
    counts[index] += 1
    return counts[index] - 1
