"""The transport port: a transport moves weights from the trainer to the engines, bucket by bucket."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from millrace.buckets import Bucket
from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.types import Capability, EngineInfo
from millrace.weights.step import StepResult, take_step

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore

NamedTensors = Sequence[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class PublishTarget:
    """An engine to publish to, and what its server reports about itself."""

    engine: Engine
    info: EngineInfo

    def can(self, capability: Capability) -> bool:
        return capability in self.info.capabilities


@dataclass(frozen=True, slots=True)
class StagedBucket:
    """A bucket of tensors that engines can load.

    bucket_for: returns the `Bucket` to pass to one engine's `load`.
    checksums: the checksum of each tensor by name (`millrace.checksum`); empty if the transport does not read the
        bytes.
    names: the names of the tensors, in order.
    nbytes: the size of the tensors.
    samples: begins to compute sampled checksums of the bucket, and returns a function that returns them by the tensors'
        names; None if the transport has no `samples_buckets`.
    """

    bucket_for: Callable[[PublishTarget], Bucket]
    checksums: Mapping[str, str]
    names: tuple[str, ...]
    nbytes: int
    samples: Callable[[], Callable[[], Mapping[str, str]]] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class ExchangedBucket(StagedBucket):
    """A bucket of parts of tensors, for each rank its own. `names` has the tensors of which no part follows, and
    `samples` the parts by their names.

    exchanged: the bytes that ranks of the trainer have sent each other for it, or engines that are apart.
    """

    exchanged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """The arguments of `Transport.create`. A transport that needs a GPU uses torch's current device.

    capabilities: the capabilities that all engines have.
    here: whether all engines run on the trainer's host.
    store: the version store; None if the run has none.
    sidecars: the URL of each engine's sidecar, by the engine's name; None for an engine on this host without a sidecar.
    spare_sidecars: the URLs of sidecars on hosts where engines may be started later.
    sidecar_key: the API key of the sidecars.
    """

    capabilities: frozenset[Capability]
    here: bool = False
    store: "VersionStore | None" = None
    sidecars: Mapping[str, str | None] | None = None
    spare_sidecars: Sequence[str] = ()
    sidecar_key: str | None = None


class Transport(ABC):
    """Base class of the transports.

    For each publish, the publisher calls `open` once, and then takes the buckets from `staged`. It calls `deliver` and
    `load` for each bucket:

        await transport.open(targets, version, deadline=60.0)
        for bucket in transport.staged(buckets):
            await transport.deliver(targets, deadline=60.0)
            await transport.load(targets, bucket, deadline=60.0)

    Only `staged` and `close` must be implemented. `open` and `deliver` return an error for each engine that the
    transport cannot reach, by the engine's name; the publisher leaves these engines out.

    A subclass defines `needs`, the capabilities that an engine can receive its buckets with. An engine needs one of
    them. If a bucket is in one piece of memory here, the subclass sets `samples_buckets` and gives its buckets
    `samples`; otherwise the publisher computes sampled checksums tensor by tensor, which takes several times as long.
    If `load` may be called for the next bucket while it runs, the subclass sets `loads_ahead`.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()
    samples_buckets: ClassVar[bool] = False
    loads_ahead: ClassVar[bool] = False

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        """Return a new transport. Raises PublishError if it cannot run here."""
        raise NotImplementedError(f"{cls.__name__} can't be created from settings")

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002
        version: int,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Prepare for a publish of `version`, in at most `deadline` seconds. Return the engines that cannot be
        reached."""
        return {}

    @abstractmethod
    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """Yield the buckets, each copied to where engines can reach it.

        Blocks: the publisher takes the next bucket in a thread while the engines load the one before. Raises
        PublishError if there is no room for a bucket.
        """

    async def deliver(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Bring the bucket that was staged last to the hosts of the engines, in at most `deadline` seconds. Return the
        engines that it did not reach.

        The engines still load the bucket before; during the first bucket they still generate.
        """
        return {}

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        """Have the engines load the bucket at the same time, each in at most `deadline` seconds. Return how it went, by
        the engine's name.

        targets: all engines that have not failed in this publish.

        Override this if the bucket must be sent while the engines load it, or if an engine can fail because of
        something else (`StepResult.blameless`).
        """
        async with asyncio.TaskGroup() as group:
            loading = {
                target.engine.name: group.create_task(load_bucket(target, staged, deadline)) for target in targets
            }
        return {name: task.result() for name, task in loading.items()}

    @abstractmethod
    async def close(self) -> None:
        """Free all resources. The engines still run, and none of them reads a bucket any more."""


class BucketTransport(Transport):
    """A transport with two slots: it fills one while the engines load the other."""

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        for slot, tensors in zip(itertools.cycle((0, 1)), buckets):
            yield self.stage(tensors, slot)

    @abstractmethod
    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        """Copy the tensors to where engines can reach them. Overwrites the earlier bucket in `slot` (0 or 1)."""


async def load_bucket(target: PublishTarget, staged: StagedBucket, deadline: float) -> StepResult:
    """Have one engine load the bucket in at most `deadline` seconds, and return how it went."""
    loading = target.engine.load(staged.bucket_for(target), deadline=deadline)
    return await take_step(target.engine.name, "load", loading, deadline)
