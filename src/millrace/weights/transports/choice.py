"""Which transport a fleet gets, from what trainer and engines can see of each other. Pure but for `make`, which imports
the one that was chosen, and torch with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millrace.config.models import TransportName
from millrace.errors import PublishError
from millrace.types import Capability

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore
    from millrace.weights.transports.base import Transport

# Any of its capabilities will do, if all of the engines have it.
NEEDS: dict[TransportName, tuple[Capability, ...]] = {
    "shm": (Capability.UPDATE_FROM_SHARED_MEMORY, Capability.UPDATE_FROM_TORCH_STORAGE),
    "cuda_ipc": (Capability.UPDATE_FROM_CUDA_IPC,),
    "gloo": (Capability.UPDATE_FROM_PROCESS_GROUP,),
    "nccl": (Capability.UPDATE_FROM_PROCESS_GROUP, Capability.UPDATE_FROM_BARE_NCCL),
    "disk": (Capability.UPDATE_FROM_DISK,),
    "delta": (Capability.UPDATE_FROM_DISK,),
    "ucx": (
        Capability.UPDATE_FROM_SHARED_MEMORY,
        Capability.UPDATE_FROM_TORCH_STORAGE,
        Capability.UPDATE_FROM_CUDA_IPC,
    ),
}


@dataclass(frozen=True, slots=True)
class TransportCandidate:
    """What the trainer sees of an engine. `here`: on the trainer's own host."""

    name: str
    here: bool
    capabilities: frozenset[Capability]


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport's name and why it is this one; None, and why there is none."""

    name: TransportName | None
    why: str


def choose(
    wanted: TransportName,
    engines: Sequence[TransportCandidate],
    *,
    trainer_has_gpu: bool,
    folder: bool,
    sidecars: bool = False,
) -> Choice:
    """UCX where there are sidecars. Otherwise memory where all share a host, otherwise a broadcast from GPU to GPUs or
    from CPU to CPUs, otherwise the disk if there is a folder for it. Raises PublishError where what is wanted is not
    possible; it is taken at its word about hosts and GPUs, which a container or a tunnel may hide."""
    why = "the config says so"
    if wanted == "auto" and sidecars:
        wanted, why = "ucx", "there are sidecars, and no store from which they could bring versions"
    if wanted != "auto":
        if lacking := [engine.name for engine in engines if not engine.capabilities & set(NEEDS[wanted])]:
            raise PublishError(f"publish.transport is {wanted}, and {', '.join(lacking)} can't take weights by it")
        return Choice(wanted, why)
    common = in_common(engines)
    away = [engine.name for engine in engines if not engine.here]
    if not away:
        if common & set(NEEDS["shm"]):
            return Choice("shm", "trainer and engines are on this host, and the engines on its CPU")
        if trainer_has_gpu and common & set(NEEDS["cuda_ipc"]):
            return Choice("cuda_ipc", "trainer and engines are on this host, and the engines on a GPU")
    where = f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} on another host" if away else "no memory is shared"
    # On this host an engine may be on the trainer's own GPU, which NCCL does not take twice.
    on_gpus = common & {Capability.UPDATE_FROM_CUDA_IPC, Capability.UPDATE_FROM_BARE_NCCL}
    if trainer_has_gpu and on_gpus and len(away) == len(engines) and common & set(NEEDS["nccl"]):
        return Choice("nccl", f"{where}, and all have a GPU")
    if Capability.UPDATE_FROM_PROCESS_GROUP not in common:
        where = f"{where}, and not every engine can join a process group"
        return Choice("disk" if folder and common & set(NEEDS["disk"]) else None, where)
    return Choice("gloo", where)


def in_common(engines: Sequence[TransportCandidate]) -> frozenset[Capability]:
    return frozenset[Capability].intersection(*(engine.capabilities for engine in engines))


def make(
    name: TransportName,
    common: frozenset[Capability],
    *,
    store: "VersionStore | None" = None,
    sidecars: Mapping[str, str | None] | None = None,
    sidecar_key: str | None = None,
    here: bool = False,
) -> "Transport":
    """The transport that was chosen, for engines that have these capabilities in common. Its device is torch's current
    one. `store` is for the disk and for delta, `sidecars` for delta and for UCX: each engine's, as `sidecars.assign`
    says. `here`: all engines are on this host."""
    import torch

    if name == "delta":
        from millrace.weights.transports.delta import DeltaTransport

        if store is None or sidecars is None:
            raise PublishError("publish.transport is delta, and publish.folder names no store")
        return DeltaTransport(store, sidecars, key=sidecar_key)
    if name == "ucx":
        from millrace.weights.transports.ucx import UcxTransport

        urls = {engine: url for engine, url in (sidecars or {}).items() if url is not None}
        if sidecars is None or len(urls) < len(sidecars):
            lacking = ", ".join(sorted((sidecars or {}).keys() - urls.keys()))
            raise PublishError(f"publish.sidecars names none on the host of {lacking or 'any engine'}, which ucx takes")
        # Checksums of all bytes are made on the CPU, so the bytes must be there for engines that are compared by them.
        on_gpu = torch.cuda.is_available() and Capability.CHECKSUMS not in common
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return UcxTransport(urls, device, key=sidecar_key)
    if name == "disk":
        from millrace.weights.transports.disk import DiskTransport

        if store is None or not store.shared:
            raise PublishError("publish.transport is disk, and publish.folder names no path that engines can read")
        return DiskTransport(store)
    if name in ("gloo", "nccl"):
        from millrace.weights.transports.process_group import ProcessGroupTransport, SendingGroup

        if name == "gloo":
            return ProcessGroupTransport(SendingGroup, torch.device("cpu"), together=False)
        if not torch.cuda.is_available():
            raise PublishError("publish.transport is nccl, and the trainer's torch sees no GPU")
        device = torch.device("cuda", torch.cuda.current_device())
        if Capability.UPDATE_FROM_PROCESS_GROUP in common:
            # Between GPUs of one host NCCL does not notice that a rank has died, and an SGLang goes on waiting.
            return ProcessGroupTransport(SendingGroup, device, together=not here)
        from millrace.weights.transports.bare_nccl import BareNcclGroup

        return ProcessGroupTransport(BareNcclGroup, device, together=False)
    if name == "cuda_ipc":
        from millrace.weights.transports.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(torch.device("cuda", torch.cuda.current_device()))
    if Capability.UPDATE_FROM_SHARED_MEMORY in common:
        from millrace.weights.transports.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport()
    from millrace.weights.transports.torch_storage import TorchStorageTransport

    return TorchStorageTransport()
