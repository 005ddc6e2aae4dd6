"""Trainer and engines on one GPU: a bucket is the trainer's memory, which the engines open by CUDA IPC and copy from.

One copy into the bucket, one out of it, both within the GPU. Torch counts who has opened a share (`_share_cuda_`), so
every rank of every engine gets one of its own, for one use.
"""

from typing import Self

import torch

from millrace.errors import PublishError
from millrace.types import Capability, CudaIpcBucket, CudaIpcShare, TensorSpec
from millrace.weights.transports.base import NamedTensors, TransportContext
from millrace.weights.transports.slots import MemoryTransport


class DeviceSlot:
    """One allocation on a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise PublishError(
                f"no {size / 2**20:.0f} MiB on {device} for a bucket; lower publish.bucket_bytes"
            ) from error

    def share(self) -> CudaIpcShare:
        storage = self.bytes.untyped_storage()
        _, handle, nbytes, offset, counter, counter_offset, event, sync = storage._share_cuda_()  # type: ignore[no-untyped-call]
        uuid = str(torch.cuda.get_device_properties(self.bytes.device).uuid)
        return CudaIpcShare(uuid, handle, nbytes, offset, counter, counter_offset, event, sync)

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


class CudaIpcTransport(MemoryTransport[DeviceSlot]):
    """Engines open the bucket's GPU memory, which is on `device`."""

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
    """Copies the tensors into `target`, [nbytes] uint8 on a GPU, and waits for that."""
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        place = target[spec.offset : spec.offset + spec.nbytes]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
    torch.cuda.current_stream(target.device).synchronize()  # nobody must read what is still being written
