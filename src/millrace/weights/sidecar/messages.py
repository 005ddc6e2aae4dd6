"""What a trainer and a sidecar say to each other about a bucket that travels over UCX. A pull says all that the sidecar
needs, so one that was started anew needs no introduction."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from millrace.types import (
    Bucket,
    Capability,
    CudaIpcBucket,
    CudaIpcShare,
    SharedMemoryBucket,
    TensorSpec,
    TorchStorageBucket,
)


class Form(StrEnum):
    """What engines open on their own host."""

    MEMORY_FILE = "memory_file"
    TORCH_STORAGE = "torch_storage"
    CUDA_IPC = "cuda_ipc"


FORMS = {
    Capability.UPDATE_FROM_SHARED_MEMORY: Form.MEMORY_FILE,
    Capability.UPDATE_FROM_TORCH_STORAGE: Form.TORCH_STORAGE,
    Capability.UPDATE_FROM_CUDA_IPC: Form.CUDA_IPC,
}


class Message(BaseModel):
    """In JSON; bytes are in base64."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_bytes="base64", val_json_bytes="base64"
    )


class PullBody(Message):
    """Read `nbytes` from `address` in the trainer's memory, of which `agent` (NIXL's metadata) is the way, into a slot
    of the sidecar's, and hand it on in `form`, to be opened `shares` times. `session` is the trainer's endpoint; all
    that the sidecar has of another is given up. `seconds`: the time that there is."""

    session: str
    agent: bytes
    slot: Annotated[int, Field(ge=0, le=1)]
    address: NonNegativeInt
    nbytes: PositiveInt
    gpu: NonNegativeInt | None
    form: Form
    shares: PositiveInt
    seconds: PositiveFloat


class Session(Message):
    """To a sidecar: the trainer is done with it. From one: what it holds."""

    session: str


class MemoryFileHandle(Message):
    path: str

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:  # noqa: ARG002
        return SharedMemoryBucket(self.path, tensors)


class TorchStorageHandle(Message):
    manager: bytes
    handle: bytes
    storage_bytes: int

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:  # noqa: ARG002
        return TorchStorageBucket(self.manager, self.handle, self.storage_bytes, tensors)


class CudaIpcHandle(Message):
    shares: tuple[CudaIpcShare, ...]

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:
        return CudaIpcBucket(self.shares[start : start + ranks], nbytes, tensors)


Handle = MemoryFileHandle | TorchStorageHandle | CudaIpcHandle


class Pulled(Message):
    """What the engines of the sidecar's host open. `bucket` makes what one of them is handed, to whose ranks the shares
    from `start` on belong."""

    handle: Handle
