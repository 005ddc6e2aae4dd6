"""A transport for sharded tensors and engines that are apart: each rank of the trainer sends each rank of an engine the
parts that it has and the other needs, by a process group of all these ranks.

Rank 0 plans it, leads it, and tells the engines what comes from whom.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch.distributed as dist

from millrace.buckets import SentPartsBucket, TensorPart, TensorSpec
from millrace.engines.stock.parts import NeededParts
from millrace.errors import PublishError
from millrace.extension.millrace_samples import separated
from millrace.extension.millrace_words import first_line
from millrace.types import Capability
from millrace.weights.sharded import (
    LedTensors,
    ask_places,
    begin_sending,
    end_exchange,
    join_groups,
    send_round,
)
from millrace.weights.shards.exchange import RankPlace
from millrace.weights.shards.filling import labels
from millrace.weights.shards.leading import parts_of, require, require_equal, spec_of, to_its_end
from millrace.weights.shards.plans import PLANS, EngineRank, Plans
from millrace.weights.shards.sending import Sending
from millrace.weights.shards.views import NotExchangeable
from millrace.weights.source import WeightSource
from millrace.weights.step import StepResult
from millrace.weights.transports.base import ExchangedBucket, NamedTensors, PublishTarget, StagedBucket, Transport
from millrace.weights.transports.parts_groups import PartsGroup
from millrace.weights.transports.process_group import ProcessGroupTransport


class ApartTransport(Transport):
    """Brings one version. It takes no tensors from the publisher.

    groups, ranks: of each engine, by the engine's name. The group of an engine that does not load every bucket is
    closed. plans: of the fleet; what is made of the schedule is kept there.
    """

    samples_buckets = loads_ahead = True

    def __init__(
        self,
        led: LedTensors,
        sending: Sending,
        groups: Mapping[str, PartsGroup],
        ranks: Mapping[str, Sequence[EngineRank]],
        plans: Plans,
    ) -> None:
        self._led, self._sending, self._groups, self._ranks, self._plans = led, sending, groups, ranks, plans
        self._loaded = dict.fromkeys(groups, 0)  # buckets

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:  # noqa: ARG002
        schedule = self._sending.schedule
        specs = self._plans.once("specs", lambda: {view.name: spec_of(view) for view in schedule.views})
        for number, one in enumerate(schedule.rounds):
            still = [name for name, group in self._groups.items() if not group.closed]
            gets = {rank.beside for name in still for rank in self._ranks[name]}
            numbers = {name: self._announce(number, name) for name in self._groups}
            try:
                samples = send_round(self._led, self._sending, number)
            except PublishError:
                self._close_groups(self._groups)  # the engines need not wait for what does not come
                raise
            tensors = tuple(specs[name] for name in one.names)
            made = {
                name: SentPartsBucket(group.name, numbers[name], self._parts(number, name), tensors)
                for name, group in self._groups.items()
            }
            yield ExchangedBucket(
                lambda target, made=made: made[target.engine.name],  # type: ignore[misc]
                {},
                one.names,
                sum(spec.nbytes for spec in tensors),
                sum(piece.nbytes for piece in one.pieces if piece.receiver in gets),
                samples=lambda number=number, samples=samples: partial(self._samples, number, samples),  # type: ignore[misc]
            )

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        results = await super().load(targets, staged, deadline=deadline)
        for name, result in results.items():
            self._loaded[name] += result.error is None
        self._close_groups(name for name, result in results.items() if result.error is not None)
        return results

    async def close(self) -> None:
        rounds = len(self._sending.schedule.rounds)
        self._close_groups(name for name, loaded in self._loaded.items() if loaded < rounds)
        await to_its_end(end_exchange, self._led, self._sending)

    def _announce(self, number: int, engine: str) -> int:
        schedule, ranks = self._sending.schedule, self._ranks[engine]
        senders, one = len(schedule.owners), schedule.rounds[number]
        room = max(schedule.slot_bytes(rank.beside) for rank in ranks)
        return self._groups[engine].announce(
            room, [one.received(rank.beside, schedule.ranks)[:senders] for rank in ranks]
        )

    def _close_groups(self, engines: Iterable[str]) -> None:
        for name in engines:
            self._groups[name].close()

    def _parts(self, number: int, engine: str) -> tuple[tuple[TensorPart, ...], ...]:
        """Return the parts in a round's bucket of each rank of an engine."""
        schedule = self._sending.schedule
        return self._plans.once(
            (number, engine), lambda: tuple(parts_of(schedule, number, rank) for rank in self._ranks[engine])
        )

    def _samples(self, number: int, of_ranks: Sequence[str]) -> dict[str, str]:
        """Return the sampled checksums of the parts that all ranks send in a round, by the parts' labels."""
        samples: dict[str, str] = {}
        for rank, of_rank in enumerate(of_ranks):
            names = self._plans.once((number, rank), partial(self._labels, number, rank))
            samples.update(zip(names, separated(of_rank), strict=True))
        return samples

    def _labels(self, number: int, rank: int) -> list[str]:
        schedule = self._sending.schedule
        return labels(schedule, schedule.rounds[number].outgoing(rank, schedule.ranks))


async def begin_apart(
    led: LedTensors,
    source: WeightSource,
    targets: Sequence[PublishTarget],
    transport: ProcessGroupTransport,
    bucket_bytes: int,
    deadline: float,
) -> ApartTransport:
    """Return a transport by which the trainer's ranks send the parts of `source`. The arguments are those of
    `transport.exchanging`.

    Raises NotExchangeable or EngineError if the tensors must be gathered, and PublishError as `exchanging` does.
    """
    require(Capability.SENT_PARTS, targets)
    require_fewer_bytes(transport, len(targets), dist.get_world_size())
    ends = time.monotonic() + deadline
    plans = PLANS.setdefault(transport, Plans())
    views = await to_its_end(plans.views, source, led.sharded.tensors)
    ranks = await to_its_end(ask_places, led)
    if any((rank.gpu is not None) != (transport.device.type == "cuda") for rank in ranks):
        raise NotExchangeable(f"{transport.device.type} memory is sent, and the trainer's tensors are elsewhere")
    groups = await _groups(targets, transport, ranks, deadline)
    try:
        needs = await _join(led, [spec_of(view) for view in views], groups, ends)
        require_equal(needs)
        engine_ranks, first = dict[str, list[EngineRank]](), len(ranks)
        for target, needed in zip(targets, needs, strict=True):
            engine_ranks[target.engine.name] = [EngineRank(first + index, of) for index, of in enumerate(needed)]
            first += len(needed)

        def begin() -> ApartTransport:
            schedule = plans.schedule(views, ranks, engine_ranks, bucket_bytes)
            sending = begin_sending(led, [group.name for group in groups], schedule)
            named = {group.engine.name: group for group in groups}
            return ApartTransport(led, sending, named, engine_ranks, plans)

        return await to_its_end(begin)
    except BaseException:
        for group in groups:
            group.close()
        raise


def require_fewer_bytes(transport: ProcessGroupTransport, engines: int, senders: int) -> None:
    """Raise NotExchangeable if one broadcast for all engines makes the trainer send less.

    Rank 0 sends every byte once in a broadcast. If the engines get parts, each rank of the trainer sends its share of
    the model to each engine.
    """
    if transport.together and engines > senders:
        raise NotExchangeable(f"one broadcast reaches all {engines} engines, and only {senders} ranks would send parts")


async def _join(
    led: LedTensors, specs: Sequence[TensorSpec], groups: Sequence[PartsGroup], ends: float
) -> list[NeededParts]:
    """Have all ranks join the groups, and return which parts the ranks of each engine need.

    They join at the same time: an engine may answer only when it has met the trainer's ranks. If one can't join, its
    group is closed, so that these do not wait for it. Raises NotExchangeable or EngineError then.
    """

    async def enter(group: PartsGroup) -> NeededParts:
        await group.enter()
        try:
            return await group.engine.needed_parts(specs, deadline=ends - time.monotonic(), group=group.name)
        except BaseException:
            group.close()
            raise

    seconds = (ends - time.monotonic()) / 2
    joining = asyncio.create_task(to_its_end(join_groups, led, [group.group for group in groups], seconds))
    try:
        entered = await asyncio.gather(*map(enter, groups), return_exceptions=True)
    finally:
        failed = await joining
    if errors := [error for error in entered if isinstance(error, BaseException)]:
        raise errors[0]
    for why in failed.values():
        raise NotExchangeable(f"a process group of their ranks and the engines' did not form: {why}")
    return [needs for needs in entered if not isinstance(needs, BaseException)]


async def _groups(
    targets: Sequence[PublishTarget],
    transport: ProcessGroupTransport,
    ranks: Sequence[RankPlace],
    deadline: float,
) -> list[PartsGroup]:
    """Return a group for each engine. Raises NotExchangeable if one can't be made."""
    several_hosts = len({rank.host for rank in ranks}) > 1
    try:
        return await transport.parts_groups(targets, len(ranks), several_hosts=several_hosts, deadline=deadline)
    except (OSError, RuntimeError) as error:
        raise NotExchangeable(f"rank 0 could not create a process group: {first_line(error)}") from error
