"""Trainer and engines on one host: buckets lie in memory files that both sides map.

The files have no name in any file system (memfd_create(2)); an engine opens them under /proc/PID/fd of the trainer. So
nothing is left behind whichever way the trainer ends: the kernel frees the memory with its last reader.
"""

import mmap
import os

import numpy as np
import torch

from millrace.checksum import Checksum, checksum
from millrace.errors import PublishError
from millrace.types import SharedMemoryBucket
from millrace.weights.plan import layout, padded
from millrace.weights.transports.base import NamedTensors, StagedBucket, Transport

PIECE_BYTES = 256 * 1024


class SharedMemoryTransport(Transport):
    """Two memory files, grown to the largest bucket seen and kept, so that their pages are faulted in once."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        specs = layout([(n, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for n, t in tensors])
        size = specs[-1].offset + padded(specs[-1].nbytes)
        memory = self._slot(slot, size)
        checksums = {}
        for spec, (_, tensor) in zip(specs, tensors, strict=True):
            target = memory.bytes[spec.offset : spec.offset + spec.nbytes]
            checksums[spec.name] = _copy(tensor.detach(), target)
        return StagedBucket(SharedMemoryBucket(memory.path, specs), checksums, size)

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the engines read by themselves)
        return

    def close(self) -> None:
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()

    def _slot(self, index: int, size: int) -> "_Slot":
        slot = self._slots.get(index)
        if slot is None or len(slot.view) < size:
            if slot is not None:
                slot.close()
            slot = self._slots[index] = _Slot(size)
        return slot


def _copy(tensor: torch.Tensor, target: torch.Tensor) -> str:
    """Copies the tensor's bytes into `target`, [nbytes] uint8, and returns their checksum."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return checksum(target.numpy().data)
    # Piece by piece, so that the bytes are hashed while they are in the cache; by numpy, whose copy takes one thread:
    # torch's would take the cores away from the engine that loads the bucket before this one.
    source, copy, digest = tensor.reshape(-1).view(torch.uint8).numpy(), target.numpy(), Checksum()
    for start in range(0, len(copy), PIECE_BYTES):
        piece = copy[start : start + PIECE_BYTES]
        np.copyto(piece, source[start : start + PIECE_BYTES])
        digest.update(piece.data)
    return digest.hexdigest()


class _Slot:
    """One memory file, mapped."""

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
        self.view = memoryview(mmap.mmap(self._fd, size))
        self.bytes = torch.frombuffer(self.view, dtype=torch.uint8)

    def close(self) -> None:
        # The mapping goes with its last tensor; closing the descriptor is enough for everybody else.
        os.close(self._fd)
