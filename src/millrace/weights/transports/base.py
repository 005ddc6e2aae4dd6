"""The port to a transport: how a bucket's bytes get from the trainer to the engines."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millrace.types import Bucket

if TYPE_CHECKING:
    import torch

NamedTensors = Sequence[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class StagedBucket:
    """A bucket that engines can load now. `bucket_for` makes what one engine of that many ranks is handed; checksums
    are those of each tensor (`millrace.checksum`), empty where the transport does not read the bytes."""

    bucket_for: Callable[[int], Bucket]
    checksums: Mapping[str, str]
    names: tuple[str, ...]
    nbytes: int


class Transport(ABC):
    """Carries buckets. There are two slots: one is packed while the engines load the other, never more."""

    @abstractmethod
    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        """Copies the tensors to where engines can reach them, overwriting what the slot (0 or 1) held. Blocks; the
        publisher calls it in a thread. Raises PublishError where there is no room."""

    @abstractmethod
    async def send(self, staged: StagedBucket) -> None:
        """The sender's own part while the engines load: the broadcast, for a process group. Memory that the engines
        read by themselves needs none."""

    @abstractmethod
    def close(self) -> None:
        """Frees all. Only called when no engine reads any more."""
