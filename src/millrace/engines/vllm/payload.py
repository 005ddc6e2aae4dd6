"""What vLLM's workers are told of weights that come: Millrace's extension as JSON, with nothing to unpickle, vLLM's own
transfer engine in its own form. Pure."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict

from millrace.engines.opcodes import PROTOCOL, STOP, Call, Name, encode
from millrace.engines.stock.state import InvalidStateError
from millrace.types import (
    Bucket,
    CudaIpcBucket,
    CudaIpcShare,
    DiskBucket,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)

UNIQUE_ID_KEY = "broadcast_from/0/0"


def description(bucket: Bucket, ranks: int) -> Mapping[str, object]:
    """What `millrace_load` takes. Raises InvalidStateError for a bucket that it can't read."""
    match bucket:
        case SharedMemoryBucket():
            return {"kind": "shared_memory", **asdict(bucket)}
        case CudaIpcBucket(shares, nbytes, tensors):
            if len(shares) != ranks:
                raise InvalidStateError(
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
            raise InvalidStateError("it opens no torch storage; send the tensors by shared memory")


def transfer(bucket: ProcessGroupBucket) -> Mapping[str, object]:
    """What /update_weights takes, where the backend of vLLM's transfer engine is nccl."""
    return {
        "names": [tensor.name for tensor in bucket.tensors],
        "dtype_names": [tensor.dtype for tensor in bucket.tensors],
        "shapes": [tensor.shape for tensor in bucket.tensors],
    }


def unique_id(value: bytes) -> bytes:
    """What vLLM's transfer engine looks for in the sender's store, under UNIQUE_ID_KEY: NCCL's id of the group as an
    object of vLLM's own class. 0.32 can be told it as JSON too, 0.23 can't."""
    kind = Name("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId")
    return PROTOCOL + encode(Call(Name("_ctypes", "_unpickle"), (kind, ({}, value)))) + STOP


def _share(share: CudaIpcShare) -> Mapping[str, object]:
    return {
        name: b64encode(value).decode() if isinstance(value, bytes) else value for name, value in asdict(share).items()
    }
