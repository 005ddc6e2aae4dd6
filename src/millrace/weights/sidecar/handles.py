"""Memory that other processes open, and the messages that tell them how."""

from millrace.weights.sidecar.messages import CudaIpcHandle, Handle, MemoryFileHandle, TorchStorageHandle
from millrace.weights.transports.cuda_ipc import DeviceSlot
from millrace.weights.transports.shared_memory import MemoryFile
from millrace.weights.transports.torch_storage import SharedStorage

AnySlot = MemoryFile | SharedStorage | DeviceSlot


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
