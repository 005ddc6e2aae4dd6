"""The memory of a fleet's engines, which the fleet lends to the trainer and gets back."""

from millrace.errors import PublishError
from millrace.fleet.replica_state import Slept, Woke
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.fleet.versions import Versions
from millrace.types import Capability, MemoryTag


async def sleep(replicas: OwnedReplicaSet, versions: Versions, what: frozenset[MemoryTag], *, interrupt: bool) -> None:
    """See `Fleet.sleep`."""
    if MemoryTag.WEIGHTS in what:
        if versions.frozen:
            _require_own_folder(replicas)
        versions.again = None
    replicas.asleep |= what
    # Out of rotation first: a request that came between the drain and the release would fail.
    for state in replicas.snapshot.replicas:
        await replicas.apply(state.name, Slept(what))
    async with versions.changing:
        if interrupt:
            await replicas.each(lambda replica: replica.engine.abort())
        await replicas.each(lambda replica: replica.engine.sleep(what))


async def wake(replicas: OwnedReplicaSet, versions: Versions, what: frozenset[MemoryTag]) -> None:
    """See `Fleet.wake`."""
    async with versions.changing:
        await replicas.each(lambda replica: replica.engine.wake(what))
        replicas.asleep -= what
    await replicas.notify()
    for state in replicas.snapshot.replicas:
        await replicas.apply(state.name, Woke(what))


async def restore(replicas: OwnedReplicaSet, versions: Versions, bucket_bytes: int, deadline: float) -> None:
    """See `Fleet.restore`."""
    if not versions.frozen:
        raise PublishError(
            "only a frozen fleet can be restored; wake this fleet, and publish the version that it should serve"
        )
    await wake(replicas, versions, frozenset({MemoryTag.WEIGHTS}))
    empty = [state.name for state in replicas.snapshot.replicas if state.usable and state.version is None]
    if empty:
        await versions.restore([replicas.by_name[name] for name in empty], bucket_bytes, deadline)
    await wake(replicas, versions, frozenset({MemoryTag.KV_CACHE}))


def _require_own_folder(replicas: OwnedReplicaSet) -> None:
    """Raises PublishError if an engine can't read its weights again from the model's folder."""
    infos = {name: replica.info for name, replica in replicas.by_name.items()}
    if lacking := [name for name, info in infos.items() if Capability.UPDATE_FROM_DISK not in info.capabilities]:
        raise PublishError(
            f"{', '.join(lacking)} can't read weights again from a folder (an SGLang that quantises can't), so sleep "
            "would lose them; give the fleet devices of its own"
        )
