"""Trainer and engines on one host, on the CPU, by torch's own sharing: what SGLang opens without a module of ours.

Torch's strategy `file_system` (torch.multiprocessing): POSIX shared memory with a name, which a helper process of
torch's removes with its last user, also when both are killed. Its other strategy, a file descriptor handed over a
socket, kills SGLang 0.5.15.
"""

import torch

from millrace.errors import PublishError
from millrace.types import TensorSpec, TorchStorageBucket
from millrace.weights.transports.base import NamedTensors
from millrace.weights.transports.slots import MemoryTransport, copy_to_host


class SharedStorage:
    """One storage that other processes can open by name."""

    def __init__(self, size: int) -> None:
        try:
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
    """For engines with Capability.UPDATE_FROM_TORCH_STORAGE."""

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
