"""Memory that other processes open, and the messages that tell them how."""

import torch

from millrace.weights.sidecar.messages import CudaIpcHandle, Form, Handle, MemoryFileHandle, TorchStorageHandle
from millrace.weights.transports.cuda_ipc import DeviceSlot
from millrace.weights.transports.shared_memory import MemoryFile
from millrace.weights.transports.torch_storage import SharedStorage

AnySlot = MemoryFile | SharedStorage | DeviceSlot


def new_slot(form: Form, size: int, device: torch.device) -> AnySlot:
    """Return memory of `size` bytes. device: the GPU that it is on, for CUDA IPC. Raises PublishError if there is no
    room."""
    match form:
        case Form.MEMORY_FILE:
            return MemoryFile(size)
        case Form.TORCH_STORAGE:
            return SharedStorage(size)
        case Form.CUDA_IPC:
            return DeviceSlot(size, device)


def handle_of(slot: AnySlot, shares: int) -> Handle:
    """Return a handle that engines can open `shares` times."""
    match slot:
        case MemoryFile():
            return MemoryFileHandle(path=slot.path)
        case SharedStorage():
            slot.promise(openings=shares)
            return TorchStorageHandle(manager=slot.manager, handle=slot.handle, storage_bytes=slot.bytes.nbytes)
        case DeviceSlot():
            return CudaIpcHandle(shares=tuple(slot.share() for _ in range(shares)))
