"""What engines load: tensors in memory, in a process group or in a folder, as values without I/O and without torch."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor and its position in a bucket. dtype is torch's name without the module, as in `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket
    nbytes: int


@dataclass(frozen=True, slots=True)
class SharedMemoryBucket:
    """Tensors packed into a shared-memory file that the engine's host can open at `path`."""

    path: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class RankAnswers:
    """Files on an engine's host that its ranks write answers to, one for each rank in their order.

    read: takes the seconds that it may need, and returns what each rank has written; empty if nothing. Raises
        EngineError.
    """

    files: tuple[str, ...]
    read: Callable[[float], Awaitable[Sequence[bytes]]] = field(compare=False)


@dataclass(frozen=True, slots=True)
class TorchStorageBucket:
    """Tensors packed into CPU memory that torch shares by name (its sharing strategy `file_system`).

    manager, handle, nbytes: as `UntypedStorage._share_filename_cpu_` returns them.
    answers: where the ranks can answer, if the memory is not this process's.
    """

    manager: bytes
    handle: bytes
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    answers: RankAnswers | None = None


@dataclass(frozen=True, slots=True)
class CudaIpcShare:
    """A handle by which one other process opens GPU memory, as `UntypedStorage._share_cuda_` returns it.

    torch counts references, so each handle is for one process and can be opened once.
    """

    device: str  # the GPU's UUID; an index would mean another GPU if CUDA_VISIBLE_DEVICES differs
    handle: bytes
    storage_bytes: int
    storage_offset: int  # bytes from the start of the allocation
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


@dataclass(frozen=True, slots=True)
class CudaIpcBucket:
    """Tensors packed into GPU memory, with one handle for each of the engine's ranks, in their order.

    Each handle is of memory on its rank's GPU, if the rank's GPU is known (`EngineInfo.gpus`).
    answers: where the ranks can answer, if the memory is not this process's.
    """

    shares: tuple[CudaIpcShare, ...]
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    answers: RankAnswers | None = None


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """A torch.distributed group in which rank 0, the sender, broadcasts weights, or several ranks send parts of them.

    The engine's ranks have the numbers from `rank_offset` on. by_bucket: whether buckets are sent as a whole, which
    needs Capability.WHOLE_BROADCASTS. The ranks then join with the first bucket. senders: how many of the first ranks
    send parts; 0 if rank 0 broadcasts.
    """

    name: str
    backend: str  # gloo or nccl
    address: str
    port: int
    rank_offset: int
    world_size: int
    by_bucket: bool = False
    senders: int = 0


@dataclass(frozen=True, slots=True)
class ProcessGroupBucket:
    """Tensors that rank 0 of a process group broadcasts, in this order. The engine must have joined the group.

    number: under which rank 0 announces the bucket, if it broadcasts its bytes as a whole. None: one tensor at a time.
    """

    group_name: str
    tensors: tuple[TensorSpec, ...]
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """A file on the engine's host with what has changed in a version (`weights.building.ChangesFile`).

    base: the digest of the version that it has changed from.
    """

    path: str
    base: str


@dataclass(frozen=True, slots=True)
class DiskBucket:
    """A folder of safetensors files on a path that the engine's host can read.

    digest: identifies the folder's weights; empty if it is not known. changes: an engine that holds their base needs
    to read only what has changed. answers: where its ranks can answer, if they are not on this process's host.
    """

    path: str
    digest: str = ""
    changes: Changes | None = None
    answers: RankAnswers | None = None

    def for_holder_of(self, digest: str) -> "DiskBucket":
        """Return the bucket for an engine that holds the version with this digest: without changes of another one."""
        fits = self.changes is not None and self.changes.base == digest
        return self if fits else replace(self, changes=None)


@dataclass(frozen=True, slots=True)
class PeerBucket:
    """All tensors of a version, which another engine at `url` serves. The ticket is secret, and good for one reading.

    version: that of the other engine when it offered its weights; None if it has none.
    """

    url: str
    ticket: str = field(repr=False)
    version: int | None


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A rectangular part of a named tensor, and its position in a bucket, where it is contiguous.

    box: the start and the end along each dimension of the tensor. offset: bytes from the start of the bucket.
    """

    name: str
    dtype: str
    box: tuple[tuple[int, int], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class RankBucket:
    """Memory for one rank of an engine, and the parts in it that this rank reads. `memory` names no tensors."""

    memory: "TorchStorageBucket | SharedMemoryBucket | CudaIpcBucket"
    parts: tuple[TensorPart, ...]


@dataclass(frozen=True, slots=True)
class PartsBucket:
    """For each of an engine's ranks, in their order, a bucket of the parts of tensors that this rank needs.

    tensors: the tensors of which no part follows in a later bucket. Their offsets mean nothing.
    """

    ranks: tuple[RankBucket, ...]
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class SentPartsBucket:
    """Parts of tensors that the first ranks of a process group send to an engine's ranks, to each the parts that it
    needs. The engine must have joined the group.

    number: under which rank 0 announces the bucket. parts: of each of the engine's ranks, in their order. tensors: as
    in PartsBucket.
    """

    group_name: str
    number: int
    parts: tuple[tuple[TensorPart, ...], ...]
    tensors: tuple[TensorSpec, ...]


Bucket = (
    SharedMemoryBucket
    | TorchStorageBucket
    | CudaIpcBucket
    | PartsBucket
    | SentPartsBucket
    | ProcessGroupBucket
    | DiskBucket
    | PeerBucket
)
