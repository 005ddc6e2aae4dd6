"""A sample's deadline stands still while no engine can generate."""

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import pytest

from millrace.engines.start import Replica
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.replica_state import ReplicaState
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.types import ALL_MEMORY
from tests.rollout.test_scheduler import make_runner

LEFT = 0.2  # the seconds that the sample has left
STANDSTILL = 0.5


class Unused:
    """Observes nothing, since a fleet without replicas has nothing to observe."""

    def replica_changed(self, before: ReplicaState, after: ReplicaState) -> None: ...

    def watching(self, replica: Replica) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def is_idle(self, name: str) -> bool:
        return True


@pytest.mark.parametrize("why", ["asleep", "started again"])
async def test_time_stands_still(why: str, tiny_model: Path) -> None:
    replica_set = OwnedReplicaSet([], EventLog(), Unused())
    if why == "asleep":
        replica_set.asleep = ALL_MEMORY
    else:
        replica_set.coming.add("engine-0")
    runner = make_runner(FleetClient(replica_set, replica_set.event_log, 0), tiny_model)
    async with asyncio.timeout(LEFT) as timer:
        asking = asyncio.create_task(runner._time_left(timer))
        await asyncio.wait([asking], timeout=STANDSTILL)
        assert not asking.done()
        replica_set.asleep = frozenset()
        replica_set.coming.clear()
        await replica_set.notify()
        assert 0 < await asking <= LEFT
        assert timer.when() is not None
