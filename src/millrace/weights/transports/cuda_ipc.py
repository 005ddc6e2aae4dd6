"""A transport for a trainer and engines on one GPU: the engines open the trainer's memory by CUDA IPC and copy from it.

A tensor is copied twice, into the bucket and out of it, both within the GPU. Torch counts how often a share
(`_share_cuda_`) is opened, so every rank of every engine gets its own share, for one use.
"""

from typing import Self

import torch

from millrace.errors import PublishError
from millrace.types import Capability, CudaIpcBucket, CudaIpcShare, TensorSpec
from millrace.weights.transports.base import NamedTensors, TransportContext
from millrace.weights.transports.slots import MemoryTransport


class DeviceSlot:
    """One allocation on a GPU. Raises PublishError if there is no room."""

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise PublishError(
                f"no {size / 2**20:.0f} MiB on {device} for a bucket; lower publish.bucket_bytes"
            ) from error

    def share(self) -> CudaIpcShare:
        """Return a handle of the memory, for one process to open once."""
        storage = self.bytes.untyped_storage()
        _, handle, nbytes, offset, counter, counter_offset, event, sync = storage._share_cuda_()  # type: ignore[no-untyped-call]
        uuid = str(torch.cuda.get_device_properties(self.bytes.device).uuid)
        return CudaIpcShare(uuid, handle, nbytes, offset, counter, counter_offset, event, sync)

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


class CudaIpcTransport(MemoryTransport[DeviceSlot]):
    """A transport whose buckets are in GPU memory on `device`, which engines open by CUDA IPC."""

    needs = frozenset({Capability.UPDATE_FROM_CUDA_IPC})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(torch.device("cuda", torch.cuda.current_device()))

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def _new_slot(self, size: int) -> DeviceSlot:
        return DeviceSlot(size, self._device)

    def _copy(self, tensors: NamedTensors, specs: tuple[TensorSpec, ...], target: torch.Tensor) -> dict[str, str]:
        copy_on_gpu(tensors, specs, target)
        return {}

    def _bucket(self, slot: DeviceSlot, specs: tuple[TensorSpec, ...], nbytes: int, ranks: int) -> CudaIpcBucket:
        return CudaIpcBucket(tuple(slot.share() for _ in range(ranks)), nbytes, specs)

    async def close(self) -> None:
        await super().close()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


def copy_on_gpu(tensors: NamedTensors, specs: tuple[TensorSpec, ...], target: torch.Tensor) -> None:
    """Copy the tensors into `target`, a uint8 tensor of shape [nbytes] on a GPU, and wait for the copies."""
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        place = target[spec.offset : spec.offset + spec.nbytes]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
    torch.cuda.current_stream(target.device).synchronize()  # engines must not read the bucket before it is written
