"""The transports by name. A transport is one module in this package and one line in `CLASSES`."""

from importlib import import_module

from millrace.config.models import TransportName
from millrace.types import Capability
from millrace.weights.transports.base import Transport, TransportContext

# If a transport has several classes, the first that all engines have a capability for is used. Importing one imports
# torch.
CLASSES: dict[TransportName, tuple[str, ...]] = {
    "shm": ("shared_memory:SharedMemoryTransport", "torch_storage:TorchStorageTransport"),
    "cuda_ipc": ("cuda_ipc:CudaIpcTransport",),
    "gloo": ("whole_broadcast:GlooTransport", "process_group:GlooTransport"),
    "nccl": ("whole_broadcast:NcclTransport", "process_group:NcclTransport", "bare_nccl:BareNcclTransport"),
    "disk": ("disk:DiskTransport",),
    "delta": ("delta:DeltaTransport",),
    "ucx": ("ucx:UcxTransport",),
}


def needs(name: TransportName) -> frozenset[Capability]:
    """Return the capabilities that an engine can receive weights with; an engine needs one of them."""
    return frozenset[Capability]().union(*(transport.needs for transport in _classes(name)))


def create(name: TransportName, context: TransportContext) -> Transport:
    """Return a new transport of that name. Raises PublishError if it cannot run here."""
    classes = _classes(name)
    usable = (transport for transport in classes if transport.needs & context.capabilities)
    return next(usable, classes[-1]).create(context)


def _classes(name: TransportName) -> list[type[Transport]]:
    found = []
    for path in CLASSES[name]:
        module, _, attribute = path.partition(":")
        found.append(getattr(import_module(f"{__package__}.{module}"), attribute))
    return found
