"""The messages between a trainer and a sidecar about buckets over UCX. A pull holds all that the sidecar needs, so a
sidecar can be restarted at any time."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from millrace.buckets import Bucket, CudaIpcBucket, CudaIpcShare, SharedMemoryBucket, TensorSpec, TorchStorageBucket
from millrace.types import Capability


class Form(StrEnum):
    """A form of memory that engines can open on their own host."""

    MEMORY_FILE = "memory_file"
    TORCH_STORAGE = "torch_storage"
    CUDA_IPC = "cuda_ipc"


FORMS = {
    Capability.UPDATE_FROM_SHARED_MEMORY: Form.MEMORY_FILE,
    Capability.UPDATE_FROM_TORCH_STORAGE: Form.TORCH_STORAGE,
    Capability.UPDATE_FROM_CUDA_IPC: Form.CUDA_IPC,
}


class Message(BaseModel):
    """A JSON message. Bytes are in base64."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_bytes="base64", val_json_bytes="base64"
    )


class Source(Message):
    """Where a bucket can be read: in the trainer's memory, or in another sidecar's.

    agent: NIXL's metadata of the endpoint.
    address: of the bucket.
    gpu: the index of the GPU that it is on; None for the CPU.
    """

    agent: bytes
    address: NonNegativeInt
    gpu: NonNegativeInt | None


class PullBody(Message):
    """The body of `POST /pull`: read a bucket into a slot of the sidecar.

    session: the name of the trainer's endpoint. The sidecar frees the buckets of any other session.
    source: where the bucket is.
    slot: the index of the sidecar's slot.
    nbytes: the bucket's size.
    form: the form of memory that the engines open.
    shares: how often the bucket will be opened, once by each rank of each engine.
    seconds: the time that the sidecar has.
    readable: seconds from now in which other sidecars may read the slot.
    unread: whether it is certain that no other sidecar is reading a slot now.
    """

    session: str
    source: Source
    slot: Annotated[int, Field(ge=0, le=1)]
    nbytes: PositiveInt
    form: Form
    shares: PositiveInt
    seconds: PositiveFloat
    readable: PositiveFloat
    unread: bool


class BringBody(Message):
    """The body of `POST /bring`: bring a version from the store.

    session: of the trainer, for the answers. ranks: the number of all ranks of all engines that will load it.
    """

    session: str
    version: NonNegativeInt
    ranks: NonNegativeInt


class BroughtVersion(Message):
    """The answer to BringBody.

    path: the version's folder. digest: that of its checksums. changes, base: a file of what has changed since the
    version with the digest `base`; empty if there is none. answers: for each rank, a file that it can answer to.
    """

    path: str
    digest: str
    changes: str = ""
    base: str = ""
    answers: tuple[str, ...] = ()


class AnswersBody(Message):
    """The body of `POST /answers`: what have the ranks of an engine written about the bucket in a slot?

    start, ranks: the index of the engine's first file, and their number.
    """

    session: str
    slot: Annotated[int, Field(ge=0, le=1)]
    start: NonNegativeInt
    ranks: PositiveInt


class Answers(Message):
    """The answer to AnswersBody: the text of each rank, empty if it has written none."""

    texts: tuple[bytes, ...]


class Session(Message):
    """The body of `POST /end`: the trainer needs the session's buckets no more.

    unread: whether it is certain that no other sidecar is reading them.
    """

    session: str
    unread: bool


class MemoryFileHandle(Message):
    """A bucket in a memory file."""

    path: str

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:  # noqa: ARG002
        return SharedMemoryBucket(self.path, tensors)


class TorchStorageHandle(Message):
    """A bucket in torch's shared memory."""

    manager: bytes
    handle: bytes
    storage_bytes: int

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:  # noqa: ARG002
        return TorchStorageBucket(self.manager, self.handle, self.storage_bytes, tensors)


class CudaIpcHandle(Message):
    """A bucket in GPU memory, with a share for each rank of each engine."""

    shares: tuple[CudaIpcShare, ...]

    def bucket(self, tensors: tuple[TensorSpec, ...], nbytes: int, start: int, ranks: int) -> Bucket:
        return CudaIpcBucket(self.shares[start : start + ranks], nbytes, tensors)


Handle = MemoryFileHandle | TorchStorageHandle | CudaIpcHandle


class Pulled(Message):
    """The answer to a pull. `handle.bucket` returns the bucket for one engine, whose ranks use the shares from index
    `start` on.

    source: where other sidecars can read the bucket.
    answers: for each share, the path of a file that its rank can write an answer to.
    """

    handle: Handle
    source: Source
    answers: tuple[str, ...]
