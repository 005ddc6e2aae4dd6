"""A transport for a trainer and engines on the CPU of one host, by torch's own shared memory. SGLang can open it
without an extension.

It uses the strategy `file_system` of torch.multiprocessing: named POSIX shared memory, which a helper process of torch
removes after its last user, even if both are killed. The other strategy passes a file descriptor over a socket, which
kills SGLang 0.5.15.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

import torch

from millrace.buckets import TensorSpec, TorchStorageBucket
from millrace.errors import PublishError
from millrace.extension.millrace_environment import settings
from millrace.launch.guard import short_place
from millrace.types import Capability
from millrace.weights.transports.base import NamedTensors, PublishTarget, TransportContext
from millrace.weights.transports.layouts import BucketLayout
from millrace.weights.transports.slots import MemoryTransport, copy_to_host


@contextmanager
def _own_stderr() -> Iterator[None]:
    """Redirect standard error to a file in memory while the block runs. Its content is written to standard error
    afterwards."""
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


@contextmanager
def _inheriting_nothing() -> Iterator[None]:
    """Keep a process that starts while the block runs from inheriting any file but the standard ones."""
    inherited = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # it is closed by now, as that of the list itself
            if descriptor > 2 and os.get_inheritable(descriptor):
                os.set_inheritable(descriptor, False)
                inherited.append(descriptor)
    try:
        yield
    finally:
        for descriptor in inherited:
            with suppress(OSError):
                os.set_inheritable(descriptor, True)


@functools.cache
def start_helper() -> None:
    """Start torch's helper process, once.

    The helper runs until no engine uses the memory, even if this process has ended. It must not inherit our standard
    error or our connections, such as those of a process group: the other end would not notice that this process has
    ended. The path of its socket must be short.
    """
    place = short_place()
    with _own_stderr(), _inheriting_nothing(), settings({"TMPDIR": place} if place != tempfile.gettempdir() else {}):
        torch.UntypedStorage._new_using_filename_cpu(1)


class SharedStorage:
    """A storage of `size` bytes that other processes can open by name. Raises PublishError if there is no room."""

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
        """Count `openings` future users. Torch removes the memory after its last user. A process that opens it does not
        count itself."""
        for _ in range(openings):
            self._storage._shared_incref()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        del self._storage


class TorchStorageTransport(MemoryTransport[SharedStorage]):
    """A transport whose buckets are storages in torch's shared memory."""

    needs = frozenset({Capability.UPDATE_FROM_TORCH_STORAGE})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls()

    def _new_slot(self, size: int) -> SharedStorage:
        return SharedStorage(size)

    def _copy(self, tensors: NamedTensors, layout: BucketLayout, target: torch.Tensor) -> dict[str, str]:
        return copy_to_host(tensors, layout.specs, target)

    def _bucket(
        self,
        slot: SharedStorage,
        specs: tuple[TensorSpec, ...],
        nbytes: int,  # noqa: ARG002 (the storage has its own size)
        target: PublishTarget,
    ) -> TorchStorageBucket:
        slot.promise(openings=target.info.ranks)
        return TorchStorageBucket(slot.manager, slot.handle, slot.bytes.nbytes, specs)
