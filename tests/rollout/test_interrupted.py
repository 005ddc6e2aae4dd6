"""A sample's deadline stands still while no engine can generate."""

import asyncio
from pathlib import Path

import pytest

from millrace.fleet.fleet import Fleet
from millrace.types import ALL_MEMORY
from tests.rollout.test_scheduler import make_runner

LEFT = 0.2  # the seconds that the sample has left
STANDSTILL = 0.5


@pytest.mark.parametrize("why", ["asleep", "started again"])
async def test_time_stands_still(why: str, tiny_model: Path) -> None:
    fleet = Fleet([], None)
    replica_set = fleet.replicas
    if why == "asleep":
        replica_set.asleep = ALL_MEMORY
    else:
        replica_set.coming.add("engine-0")
    runner = make_runner(fleet, tiny_model)
    async with asyncio.timeout(LEFT) as timer:
        asking = asyncio.create_task(runner._time_left(timer))
        await asyncio.wait([asking], timeout=STANDSTILL)
        assert not asking.done()
        replica_set.asleep = frozenset()
        replica_set.coming.clear()
        await replica_set.notify()
        assert 0 < await asking <= LEFT
        assert timer.when() is not None
