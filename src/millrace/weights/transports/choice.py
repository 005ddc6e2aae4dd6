"""Which transport a fleet gets, from what trainer and engines can see of each other. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.config.models import TransportName
from millrace.errors import PublishError
from millrace.types import Capability
from millrace.weights.transports.registry import needs


@dataclass(frozen=True, slots=True)
class TransportCandidate:
    """An engine as the trainer sees it. `here`: on the trainer's own host."""

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
        if lacking := [engine.name for engine in engines if not engine.capabilities & needs(wanted)]:
            raise PublishError(f"publish.transport is {wanted}, and {', '.join(lacking)} can't take weights by it")
        return Choice(wanted, why)
    common = in_common(engines)
    away = [engine.name for engine in engines if not engine.here]
    if not away:
        if common & needs("shm"):
            return Choice("shm", "trainer and engines are on this host, and the engines on its CPU")
        if trainer_has_gpu and common & needs("cuda_ipc"):
            return Choice("cuda_ipc", "trainer and engines are on this host, and the engines on a GPU")
    where = f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} on another host" if away else "no memory is shared"
    # On this host an engine may be on the trainer's own GPU, which NCCL does not take twice.
    on_gpus = common & {Capability.UPDATE_FROM_CUDA_IPC, Capability.UPDATE_FROM_BARE_NCCL}
    if trainer_has_gpu and on_gpus and len(away) == len(engines) and common & needs("nccl"):
        return Choice("nccl", f"{where}, and all have a GPU")
    if Capability.UPDATE_FROM_PROCESS_GROUP not in common:
        where = f"{where}, and not every engine can join a process group"
        return Choice("disk" if folder and common & needs("disk") else None, where)
    return Choice("gloo", where)


def in_common(engines: Sequence[TransportCandidate]) -> frozenset[Capability]:
    return frozenset[Capability].intersection(*(engine.capabilities for engine in engines))
