"""What does not change while a server runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace.engines.stock.model import Model
from millrace.engines.stock.state import InvalidStateError
from millrace.types import (
    Bucket,
    Capability,
    CudaIpcBucket,
    DiskBucket,
    EngineInfo,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)

TAKES: Mapping[type[Bucket], frozenset[Capability]] = {
    CudaIpcBucket: frozenset({Capability.UPDATE_FROM_CUDA_IPC}),
    TorchStorageBucket: frozenset({Capability.UPDATE_FROM_TORCH_STORAGE}),
    SharedMemoryBucket: frozenset({Capability.UPDATE_FROM_SHARED_MEMORY}),
    ProcessGroupBucket: frozenset({Capability.UPDATE_FROM_PROCESS_GROUP, Capability.UPDATE_FROM_BARE_NCCL}),
    DiskBucket: frozenset({Capability.UPDATE_FROM_DISK}),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes of a request. `seeds`: whether it honours them."""

    vocab_size: int
    context_length: int
    seeds: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """`info` is without the weight version, which changes."""

    info: EngineInfo
    model: Model
    limits: Limits


def check_takes(bucket: Bucket, info: EngineInfo) -> None:
    """Raises InvalidStateError for a bucket of a kind that the server has no capability for."""
    if not info.capabilities & TAKES[type(bucket)]:
        can = sorted(c.value for c in info.capabilities if c.startswith("update_from_"))
        raise InvalidStateError(
            f"it can't be updated by a {type(bucket).__name__}; it has {', '.join(can) or 'no way'}"
        )
