"""A bucket as the extension in vLLM's workers is told of it: as JSON, nothing to unpickle. Pure."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict

from millrace.engines.stock.state import ForbiddenError
from millrace.types import (
    Bucket,
    CudaIpcBucket,
    CudaIpcShare,
    DiskBucket,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)


def description(bucket: Bucket, ranks: int) -> Mapping[str, object]:
    """What `millrace_load` takes. Raises ForbiddenError for a bucket that it can't read."""
    match bucket:
        case SharedMemoryBucket():
            return {"kind": "shared_memory", **asdict(bucket)}
        case CudaIpcBucket(shares, nbytes, tensors):
            if len(shares) != ranks:
                raise ForbiddenError(
                    f"the bucket has {len(shares)} shares for {ranks} ranks; each opens one of its own"
                )
            return {
                "kind": "cuda_ipc",
                "shares": [_share(share) for share in shares],
                "nbytes": nbytes,
                "tensors": [asdict(tensor) for tensor in tensors],
            }
        case ProcessGroupBucket(group, tensors):
            return {"kind": "process_group", "group": group, "tensors": [asdict(tensor) for tensor in tensors]}
        case DiskBucket(path):
            return {"kind": "disk", "path": path}
        case TorchStorageBucket():
            raise ForbiddenError("it opens no torch storage; send the tensors by shared memory")


def _share(share: CudaIpcShare) -> Mapping[str, object]:
    return {
        name: b64encode(value).decode() if isinstance(value, bytes) else value for name, value in asdict(share).items()
    }
