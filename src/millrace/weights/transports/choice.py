"""The choice of a fleet's transport, by hosts, GPUs and capabilities. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.config.models import TransportName
from millrace.errors import PublishError
from millrace.types import Capability
from millrace.weights.transports.gpus import why_unseen
from millrace.weights.transports.registry import needs


@dataclass(frozen=True, slots=True)
class TransportCandidate:
    """An engine as the trainer sees it.

    here: whether it runs on the trainer's host. unseen: those of its GPUs that the trainer's process does not see.
    """

    name: str
    here: bool
    capabilities: frozenset[Capability]
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """The name of the chosen transport, and the reason. The name is None if no transport fits."""

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
    """Return the transport to use for these engines.

    `auto` selects, in this order: `ucx` if there are sidecars, memory if all engines are on the trainer's host, a
    broadcast from GPU to GPUs, a broadcast from CPU to CPUs, and the disk if there is a `folder` for it. Any other
    `wanted` transport is used even if hosts and GPUs seem to forbid it, because a container or a tunnel may hide them.

    Raises PublishError if an engine cannot receive weights by the wanted transport. `cuda_ipc` needs a process that
    sees the GPUs of all engines.
    """
    why = "the config says so"
    if wanted == "auto" and sidecars:
        wanted, why = "ucx", "there are sidecars, and no store that they could read versions from"
    if wanted != "auto":
        if lacking := [engine.name for engine in engines if not engine.capabilities & needs(wanted)]:
            raise PublishError(
                f"{', '.join(lacking)} can't take weights by the transport {wanted}; choose another, or auto"
            )
        if wanted == "cuda_ipc" and (hidden := why_hidden(engines)):
            raise PublishError(hidden)
        return Choice(wanted, why)
    common = in_common(engines)
    away = [engine.name for engine in engines if not engine.here]
    if not away:
        if common & needs("shm"):
            return Choice("shm", "trainer and engines are on this host, and the engines on its CPU")
        if trainer_has_gpu and common & needs("cuda_ipc") and not why_hidden(engines):
            return Choice("cuda_ipc", "trainer and engines are on this host, and the engines on a GPU")
    where = f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} on another host" if away else ""
    where = where or why_hidden(engines) or "no memory is shared"
    # An engine on this host may use the trainer's GPU, and NCCL does not accept two ranks on one GPU.
    on_gpus = common & {Capability.UPDATE_FROM_CUDA_IPC, Capability.UPDATE_FROM_BARE_NCCL}
    if trainer_has_gpu and on_gpus and len(away) == len(engines) and common & needs("nccl"):
        return Choice("nccl", f"{where}, and all have a GPU")
    if not common & needs("gloo"):
        where = f"{where}, and not every engine can join a process group"
        return Choice("disk" if folder and common & needs("disk") else None, where)
    return Choice("gloo", where)


def in_common(engines: Sequence[TransportCandidate]) -> frozenset[Capability]:
    """Return the capabilities that all engines have."""
    return frozenset[Capability].intersection(*(engine.capabilities for engine in engines))


def why_hidden(engines: Sequence[TransportCandidate]) -> str | None:
    """Return why CUDA IPC does not reach an engine whose GPUs this process does not see; None if it sees them all."""
    return next((why_unseen(engine.name, engine.unseen) for engine in engines if engine.unseen), None)
