"""The transport port: how the bytes of a bucket get from the trainer to the engines."""

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
    """An engine to publish to, with what it said of itself."""

    engine: Engine
    info: EngineInfo

    def can(self, capability: Capability) -> bool:
        return capability in self.info.capabilities


@dataclass(frozen=True, slots=True)
class StagedBucket:
    """A bucket that engines can load now. `bucket_for` makes what one engine is handed; checksums are those of each
    tensor (`millrace.checksum`), empty where the transport does not read the bytes."""

    bucket_for: Callable[[PublishTarget], Bucket]
    checksums: Mapping[str, str]
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """What a transport is made from. Its device is torch's current one.

    capabilities: those that all engines have. here: whether all engines are on this host. store: where versions are
    kept. sidecars: the URL of each engine's sidecar, None for an engine on this host without one."""

    capabilities: frozenset[Capability]
    here: bool = False
    store: "VersionStore | None" = None
    sidecars: Mapping[str, str | None] | None = None
    sidecar_key: str | None = None


class Transport(ABC):
    """Carries buckets to the engines. `needs`: the capabilities that an engine can receive them with; one is enough."""

    needs: ClassVar[frozenset[Capability]] = frozenset()

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        """Make the transport. Raises PublishError if it cannot run here."""
        raise NotImplementedError(f"{cls.__name__} is not made from settings")

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002
        version: int,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Before the first bucket of a publish. Returns why which engines can't be reached."""
        return {}

    @abstractmethod
    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """Brings the tensors to where engines can reach them. Blocks; the publisher goes on with it in a thread, while
        the engines load what came before, and no further. Raises PublishError where there is no room."""

    async def deliver(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """When a bucket is staged, while the engines load the one before, or generate if it is the first: what else it
        takes until these engines can reach it. Returns why which of them can't."""
        return {}

    @abstractmethod
    async def send(self, staged: StagedBucket) -> None:
        """The sender's own part while the engines load: the broadcast, for a process group. Memory that the engines
        read by themselves needs none."""

    def interrupt(self, engine: Engine) -> None:  # noqa: B027 (memory needs none)
        """The engine could not load the bucket: what others can only get with it, they need not wait for."""

    def broken(self, engine: Engine) -> str | None:  # noqa: ARG002
        """Why nothing more can be sent to the engine, until the transport is opened again."""
        return None

    async def collateral(self, failed: Sequence[Engine]) -> set[str]:  # noqa: ARG002
        """Of engines that failed, in this order: those that only lost what others had for them. They get the weights
        again, if somebody can."""
        return set()

    @abstractmethod
    async def close(self) -> None:
        """Frees all. Only called when no engine reads any more, and while the engines can still be asked."""


class BucketTransport(Transport):
    """One that brings bucket by bucket. There are two slots: one is filled while the engines load the other."""

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        for slot, tensors in zip(itertools.cycle((0, 1)), buckets):
            yield self.stage(tensors, slot)

    @abstractmethod
    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        """Copies the tensors to where engines can reach them, overwriting what the slot (0 or 1) held."""


def specs_of(tensors: NamedTensors) -> tuple[TensorSpec, ...]:
    """Where each lies in a bucket of these."""
    return layout([(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for name, t in tensors])
