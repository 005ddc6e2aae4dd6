"""The base of the transports through memory: two slots, which grow to the size of the largest bucket."""

from abc import abstractmethod
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from millrace.buckets import Bucket, TensorSpec
from millrace.checksum import Checksum, checksum
from millrace.weights.transports.base import BucketTransport, NamedTensors, PublishTarget, StagedBucket
from millrace.weights.transports.layouts import BucketLayout, layout_of

PIECE_BYTES = 256 * 1024


class Slot(Protocol):
    """Memory that an engine can open. `bytes` is a uint8 tensor of shape [nbytes]."""

    bytes: torch.Tensor

    def close(self) -> None: ...


S = TypeVar("S", bound=Slot)


class MemoryTransport(BucketTransport, Generic[S]):
    """A transport with two slots of memory, which it keeps from one publish to the next."""

    samples_buckets = loads_ahead = True

    def __init__(self) -> None:
        self._slots: dict[int, S] = {}

    @abstractmethod
    def _new_slot(self, size: int) -> S:
        """Return a slot of `size` bytes. Raises PublishError if there is no room."""

    @abstractmethod
    def _copy(self, tensors: NamedTensors, layout: BucketLayout, target: torch.Tensor) -> dict[str, str]:
        """Copy the tensors into `target`. Return their checksums by name; empty if the bytes are not read."""

    @abstractmethod
    def _bucket(self, slot: S, specs: tuple[TensorSpec, ...], nbytes: int, target: PublishTarget) -> Bucket:
        """Return the bucket for one engine, with what each of its ranks needs to open it."""

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        layout = layout_of(tensors)
        memory = self._slot(slot, layout.nbytes)
        checksums = self._copy(tensors, layout, memory.bytes)

        def bucket_for(target: PublishTarget) -> Bucket:
            return self._bucket(memory, layout.specs, layout.nbytes, target)

        samples = partial(layout.samples_in, memory.bytes)
        return StagedBucket(bucket_for, checksums, layout.names, layout.nbytes, samples=samples)

    async def close(self) -> None:
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()

    def _slot(self, index: int, size: int) -> S:
        slot = self._slots.get(index)
        if slot is None or slot.bytes.nbytes < size:
            if slot is not None:
                slot.close()
            slot = self._slots[index] = self._new_slot(size)
        return slot


def fill(memory: torch.Tensor, layout: BucketLayout, tensors: NamedTensors) -> dict[str, str]:
    """Copy the tensors into a bucket, [nbytes] uint8, and wait for the copies. Return their checksums by name; empty on
    a GPU."""
    if memory.is_cuda:
        layout.pack_on_gpu(tensors, memory)
        torch.cuda.current_stream(memory.device).synchronize()  # nothing may send it before it is written
        return {}
    return copy_to_host(tensors, layout.specs, memory)


def copy_to_host(tensors: NamedTensors, specs: tuple[TensorSpec, ...], target: torch.Tensor) -> dict[str, str]:
    """Copy the tensors into `target`, a uint8 tensor of shape [nbytes] on the CPU. Return their checksums by name."""
    return {
        spec.name: _copy(tensor.detach(), target[spec.offset : spec.offset + spec.nbytes])
        for spec, (_, tensor) in zip(specs, tensors, strict=True)
    }


def _copy(tensor: torch.Tensor, target: torch.Tensor) -> str:
    """Copy the tensor's bytes into `target`, a uint8 tensor of shape [nbytes]. Return their checksum."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return checksum(target.numpy().data)
    # Copied in pieces, so that the bytes are hashed while they are in the cache. numpy copies in one thread; torch's
    # threads would take the cores from the engine that loads the bucket before this one.
    flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape keeps the stride of a single element, which can be any
    source, copy, digest = flat.view(torch.uint8).numpy(), target.numpy(), Checksum()
    for start in range(0, len(copy), PIECE_BYTES):
        piece = copy[start : start + PIECE_BYTES]
        np.copyto(piece, source[start : start + PIECE_BYTES])
        digest.update(piece.data)
    return digest.hexdigest()
