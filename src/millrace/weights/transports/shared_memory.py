"""A transport for a trainer and engines on one host: buckets are memory files that both sides map.

The files have no name in any file system (memfd_create(2)). An engine opens them under /proc/PID/fd of the trainer. The
kernel frees the memory after its last reader, so nothing is left behind, however the trainer ends.
"""

import mmap
import os
from typing import Self

import torch

from millrace.buckets import SharedMemoryBucket, TensorSpec
from millrace.errors import PublishError
from millrace.types import Capability
from millrace.weights.transports.base import NamedTensors, PublishTarget, TransportContext
from millrace.weights.transports.layouts import BucketLayout
from millrace.weights.transports.slots import MemoryTransport, copy_to_host


class MemoryFile:
    """A mapped memory file of `size` bytes. Raises PublishError if there is no room."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("millrace-bucket", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, size)  # now, rather than by SIGBUS in the middle of a copy
        except OSError as error:
            os.close(self._fd)
            raise PublishError(
                f"no {size / 2**20:.0f} MiB of shared memory for a bucket ({error.strerror}); "
                "lower publish.bucket_bytes"
            ) from error
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.bytes = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)

    def close(self) -> None:
        # The mapping ends with its last tensor. Closing the descriptor is enough for other processes.
        os.close(self._fd)


class SharedMemoryTransport(MemoryTransport[MemoryFile]):
    """A transport whose buckets are memory files, which engines map."""

    needs = frozenset({Capability.UPDATE_FROM_SHARED_MEMORY})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls()

    def _new_slot(self, size: int) -> MemoryFile:
        return MemoryFile(size)

    def _copy(self, tensors: NamedTensors, layout: BucketLayout, target: torch.Tensor) -> dict[str, str]:
        return copy_to_host(tensors, layout.specs, target)

    def _bucket(
        self,
        slot: MemoryFile,
        specs: tuple[TensorSpec, ...],
        nbytes: int,  # noqa: ARG002 (the file has its own size)
        target: PublishTarget,  # noqa: ARG002 (any number of ranks may map it)
    ) -> SharedMemoryBucket:
        return SharedMemoryBucket(slot.path, specs)
