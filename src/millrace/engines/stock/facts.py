"""What a server is and can do. It does not change while the server runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    PartsBucket,
    PeerBucket,
    ProcessGroupBucket,
    SentPartsBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)
from millrace.engines.experts import Experts
from millrace.engines.stock.model import Model
from millrace.engines.stock.state import InvalidStateError
from millrace.types import Capability, EngineInfo

TAKES: Mapping[type[Bucket], frozenset[Capability]] = {
    CudaIpcBucket: frozenset({Capability.UPDATE_FROM_CUDA_IPC}),
    TorchStorageBucket: frozenset({Capability.UPDATE_FROM_TORCH_STORAGE}),
    PartsBucket: frozenset({Capability.UPDATE_FROM_PARTS}),
    SentPartsBucket: frozenset({Capability.SENT_PARTS}),
    SharedMemoryBucket: frozenset({Capability.UPDATE_FROM_SHARED_MEMORY}),
    ProcessGroupBucket: frozenset(
        {Capability.UPDATE_FROM_PROCESS_GROUP, Capability.WHOLE_BROADCASTS, Capability.UPDATE_FROM_BARE_NCCL}
    ),
    DiskBucket: frozenset({Capability.UPDATE_FROM_DISK}),
    PeerBucket: frozenset({Capability.UPDATE_FROM_PEER}),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server on requests.

    seeds, penalties, stop_texts, json_schema: whether it honours them. image_token: the placeholder of an image; None
    if the server takes no images.
    """

    vocab_size: int
    context_length: int
    seeds: bool
    penalties: bool = True
    stop_texts: bool = True
    json_schema: bool = True
    image_token: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server is and can do. `info` has no weight version, because that changes."""

    info: EngineInfo
    model: Model
    limits: Limits

    @property
    def experts(self) -> Experts | None:
        """The experts that the server's answers name; None if it does not return them."""
        return self.model.experts if Capability.ROUTED_EXPERTS in self.info.capabilities else None


AnyFacts = TypeVar("AnyFacts", bound=Facts)


def check_takes(bucket: Bucket, info: EngineInfo) -> None:
    """Raise InvalidStateError if the server can't load this kind of bucket."""
    if not info.capabilities & TAKES[type(bucket)]:
        can = sorted(c.value for c in info.capabilities if c.startswith("update_from_"))
        raise InvalidStateError(
            f"it can't load a {type(bucket).__name__}; it has {', '.join(can) or 'no update capability'}"
        )
