"""The transport port: a transport moves weights from the trainer to the engines, bucket by bucket."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.types import Bucket, Capability, EngineInfo, TensorSpec
from millrace.weights.plan import layout

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
    """

    bucket_for: Callable[[PublishTarget], Bucket]
    checksums: Mapping[str, str]
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """The arguments of `Transport.create`. A transport that needs a GPU uses torch's current device.

    capabilities: the capabilities that all engines have.
    here: whether all engines run on the trainer's host.
    store: the version store; None if the run has none.
    sidecars: the URL of each engine's sidecar, by the engine's name; None for an engine on this host without a sidecar.
    sidecar_key: the API key of the sidecars.
    """

    capabilities: frozenset[Capability]
    here: bool = False
    store: "VersionStore | None" = None
    sidecars: Mapping[str, str | None] | None = None
    sidecar_key: str | None = None


class Transport(ABC):
    """Base class of the transports.

    For each publish, the publisher calls `open` once, and then takes the buckets from `staged`. For each bucket it
    calls `deliver`, and then `send` while the engines load the bucket:

        await transport.open(targets, version, deadline=60.0)
        for bucket in transport.staged(buckets):
            await transport.deliver(targets, deadline=60.0)
            await asyncio.gather(
                transport.send(bucket),
                *(target.engine.load(bucket.bucket_for(target), deadline=60.0) for target in targets),
            )

    Only `staged`, `send` and `close` must be implemented. `open` and `deliver` return an error for each engine that the
    transport cannot reach, by the engine's name; the publisher leaves these engines out.

    A subclass defines `needs`, the capabilities that an engine can receive its buckets with. An engine needs one of
    them.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()

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

    @abstractmethod
    async def send(self, staged: StagedBucket) -> None:
        """Send the bucket while the engines load it, as a broadcast does. Does nothing if engines read the bucket by
        themselves."""

    def interrupt(self, engine: Engine) -> None:  # noqa: B027 (memory needs none)
        """End a broadcast in which this engine failed, so that the other engines do not wait for it."""

    def broken(self, engine: Engine) -> str | None:  # noqa: ARG002
        """Return why nothing more can be sent to the engine before the next `open`; None if it can."""
        return None

    async def collateral(self, failed: Sequence[Engine]) -> set[str]:  # noqa: ARG002
        """Return the names of the engines that failed only because another engine, or a sidecar, did. `failed` is in
        the order of the failures. The publisher sends the version to these engines again."""
        return set()

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


def specs_of(tensors: NamedTensors) -> tuple[TensorSpec, ...]:
    """Return the place of each tensor in a bucket."""
    return layout([(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for name, t in tensors])
