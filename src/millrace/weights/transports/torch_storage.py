"""Trainer and engines on one host, on the CPU, by torch's own sharing: what SGLang opens without a module of ours.

Torch's strategy `file_system` (torch.multiprocessing): POSIX shared memory with a name, which a helper process of
torch's removes with its last user, also when both are killed. Its other strategy, a file descriptor handed over a
socket, kills SGLang 0.5.15.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch

from millrace.errors import PublishError
from millrace.launch.guard import short_place
from millrace.types import Capability, TensorSpec, TorchStorageBucket
from millrace.weights.environment import settings
from millrace.weights.transports.base import NamedTensors, TransportContext
from millrace.weights.transports.slots import MemoryTransport, copy_to_host


@contextmanager
def _own_stderr() -> Iterator[None]:
    """Standard error is a file in memory as long as the block runs; what was written to it follows afterwards."""
    before, aside = os.dup(2), os.memfd_create("millrace-stderr")
    try:
        os.dup2(aside, 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
        os.lseek(aside, 0, os.SEEK_SET)
        while written := os.read(aside, 65_536):
            os.write(2, written)
    finally:
        os.close(before)
        os.close(aside)


@functools.cache
def start_helper() -> None:
    """Starts torch's helper process, once. It outlives this process while an engine uses its memory, and must not hold
    our standard error until then: a pipe at the other end would stay open. Its socket's path has to be short."""
    place = short_place()
    with _own_stderr(), settings({"TMPDIR": place} if place != tempfile.gettempdir() else {}):
        torch.UntypedStorage._new_using_filename_cpu(1)


class SharedStorage:
    """One storage that other processes can open by name."""

    def __init__(self, size: int) -> None:
        try:
            start_helper()
            self._storage = torch.UntypedStorage._new_using_filename_cpu(size)
        except RuntimeError as error:
            raise PublishError(
                f"no {size / 2**20:.0f} MiB of shared memory for a bucket ({error}); lower publish.bucket_bytes"
            ) from error
        self.manager, self.handle, _ = self._storage._share_filename_cpu_()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(self._storage)

    def promise(self, openings: int) -> None:
        """Torch counts users, and removes the memory with the last one. Who opens it is counted here already; its
        opening takes no further count."""
        for _ in range(openings):
            self._storage._shared_incref()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        del self._storage


class TorchStorageTransport(MemoryTransport[SharedStorage]):
    """Engines open the bucket by torch's own sharing."""

    needs = frozenset({Capability.UPDATE_FROM_TORCH_STORAGE})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls()

    def _new_slot(self, size: int) -> SharedStorage:
        return SharedStorage(size)

    def _copy(self, tensors: NamedTensors, specs: tuple[TensorSpec, ...], target: torch.Tensor) -> dict[str, str]:
        return copy_to_host(tensors, specs, target)

    def _bucket(
        self,
        slot: SharedStorage,
        specs: tuple[TensorSpec, ...],
        nbytes: int,  # noqa: ARG002 (the storage has its own size)
        ranks: int,
    ) -> TorchStorageBucket:
        slot.promise(openings=ranks)
        return TorchStorageBucket(slot.manager, slot.handle, slot.bytes.nbytes, specs)
