"""Describe arriving weights to Millrace's extension in vLLM's workers. Pure.

It takes JSON, so nothing is unpickled.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    CudaIpcShare,
    DiskBucket,
    PartsBucket,
    PeerBucket,
    ProcessGroupBucket,
    SentPartsBucket,
    SharedMemoryBucket,
    TensorPart,
    TensorSpec,
    TorchStorageBucket,
)
from millrace.engines.stock.state import InvalidStateError
from millrace.extension.millrace_boxes import label
from millrace.extension.millrace_samples import separated

AnyParts = PartsBucket | SentPartsBucket


def description(bucket: Bucket, ranks: int) -> tuple[Mapping[str, object], Sequence[TensorSpec]]:
    """Return the arguments of `millrace_load`: where the bucket is, and what it contains; nothing for a folder.

    Raises InvalidStateError for a bucket that the extension can't read.
    """
    match bucket:
        case SharedMemoryBucket(path, tensors):
            return {"kind": "shared_memory", "path": path}, tensors
        case CudaIpcBucket(shares, nbytes, tensors):
            if len(shares) != ranks:
                raise InvalidStateError(
                    f"the bucket has {len(shares)} shares for {ranks} ranks; each rank needs its own"
                )
            return {"kind": "cuda_ipc", "shares": [_share(share) for share in shares], "nbytes": nbytes}, tensors
        case ProcessGroupBucket(group, tensors, number) if number is not None:
            return {"kind": "process_group", "group": group, "number": number}, tensors
        case ProcessGroupBucket():
            raise InvalidStateError("by a process group it takes whole buckets, and no single tensors")
        case DiskBucket(path, digest, changes):
            own = {} if changes is None else {"changes": asdict(changes)}
            return {"kind": "disk", "path": path, "digest": digest, **own}, ()
        case TorchStorageBucket():
            raise InvalidStateError("it can't open torch storage; send the tensors by shared memory")
        case PartsBucket() | SentPartsBucket():
            raise InvalidStateError("parts of tensors are no whole tensors")  # see `parts`
        case PeerBucket():
            raise InvalidStateError("it takes no weights from another engine")


def rows_of(tensors: Sequence[TensorSpec]) -> Sequence[object]:
    """Return the rows that describe tensors to the extension: name, dtype, shape, offset and size, both in bytes."""
    return [(tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes) for tensor in tensors]


def parts(bucket: AnyParts, ranks: int) -> tuple[Mapping[str, object], Sequence[Sequence[object]]]:
    """Return the arguments of `millrace_load_parts`: where each rank's bucket is, and for each rank the rows that say
    what its bucket contains.

    Raises InvalidStateError for a bucket that the extension can't read.
    """
    if len(_parts_of(bucket)) != ranks:
        raise InvalidStateError(f"the bucket is for {len(_parts_of(bucket))} ranks, and it has {ranks}")
    rows = [[(part.name, part.dtype, part.box, part.offset) for part in of_rank] for of_rank in _parts_of(bucket)]
    if isinstance(bucket, SentPartsBucket):
        return {"ranks": [{"kind": "process_group", "group": bucket.group_name, "number": bucket.number}] * ranks}, rows
    return {"ranks": [_place(rank.memory) for rank in bucket.ranks]}, rows


def _parts_of(bucket: AnyParts) -> Sequence[Sequence[TensorPart]]:
    return bucket.parts if isinstance(bucket, SentPartsBucket) else [rank.parts for rank in bucket.ranks]


def samples_of_parts(bucket: AnyParts, ranks: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """Return the sampled checksum of each part in a bucket, by the part's name, from the ranks' answers to
    `millrace_load_parts`. Raises ValueError as `samples_of` does."""
    found: dict[str, str] = {}
    for of_rank, answer in zip(_parts_of(bucket), ranks, strict=True):
        for part, value in zip(of_rank, separated(answer["samples"]), strict=True):
            if found.setdefault(name := label(part.name, part.box), value) != value:
                raise ValueError(f"its ranks received different values of {name}")
    return found


def samples_of(names: Sequence[str], ranks: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """Return the sampled checksum of each tensor in a bucket, from the ranks' answers to `millrace_load`.

    Raises ValueError if the ranks received different values, or if there are not as many checksums as names.
    """
    first, *others = (dict(zip(names, separated(rank["samples"]), strict=True)) for rank in ranks)
    if differing := sorted(name for other in others for name, value in other.items() if value != first[name]):
        raise ValueError(f"its ranks received different values of {differing[0]}")
    return first


def _place(memory: SharedMemoryBucket | TorchStorageBucket | CudaIpcBucket) -> Mapping[str, object]:
    """Return where the bucket of one rank is."""
    match memory:
        case SharedMemoryBucket(path):
            return {"kind": "shared_memory", "path": path}
        case CudaIpcBucket((share,), nbytes):
            return {"kind": "cuda_ipc", "share": _share(share), "nbytes": nbytes}
        case _:
            raise InvalidStateError("each rank's parts must be in a memory file, or in GPU memory with one share")


def _share(share: CudaIpcShare) -> Mapping[str, object]:
    return {
        name: b64encode(value).decode() if isinstance(value, bytes) else value for name, value in asdict(share).items()
    }
