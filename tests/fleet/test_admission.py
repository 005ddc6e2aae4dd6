"""Requests that wait for room on real engines: in order, without a loss, and with a deadline."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config import EmbeddedEngineConfig
from millrace.errors import EngineTimeout
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Generation, RoutingContext
from tests.fleet.test_fleet import PROMPT, embedded, greedy, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
END = 60.0
RUNNING = 4
ON_ENGINE = RUNNING + 2  # two may wait there


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = EmbeddedEngineConfig(kind="embedded", threads=1, max_running_requests=RUNNING, faults=True)
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def slow(fleet: Fleet) -> AsyncIterator[None]:
    """The engine's steps take 20 ms more."""
    [engine] = embedded(fleet)
    await engine.inject_fault("slow", seconds=0.02)
    yield
    await engine.inject_fault("slow", seconds=0.0)
    await idle(fleet)


async def test_requests_beyond_the_engines_room_wait_and_come_in_order(fleet: Fleet, slow: None) -> None:
    ended: list[int] = []

    async def ask(number: int) -> Generation:
        made = await fleet.generate(greedy(f"r{number}", 8), deadline=END)
        ended.append(number)
        return made

    asked = [asyncio.create_task(ask(number)) for number in range(20)]
    [engine] = fleet.engines.values()
    while not (load := await engine.loads()).running_requests:
        pass
    assert load.running_requests + load.waiting_requests <= ON_ENGINE
    assert fleet.waiting >= 20 - ON_ENGINE - len(ended)
    made = await asyncio.gather(*asked)
    assert len({one.request_id for one in made}) == 20
    assert all(abs(place - number) < ON_ENGINE for place, number in enumerate(ended))
    assert fleet.waiting == 0
    assert set(fleet.outstanding.values()) == {0}
    assert fleet.event_log.metrics.waits.seconds > 0


async def test_a_request_that_gets_no_room_says_so_at_its_deadline(fleet: Fleet, slow: None) -> None:
    running = [asyncio.create_task(fleet.generate(greedy(f"long{i}", 150), deadline=END)) for i in range(ON_ENGINE)]
    await asyncio.sleep(0)
    with pytest.raises(EngineTimeout, match=r"no room for the request within 0 s: 6 requests .* run"):
        await fleet.generate(greedy("late", 8), deadline=0.3)
    assert fleet.waiting == 0
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_cancelled_wait_leaves_the_queue_and_its_room_to_others(fleet: Fleet, slow: None) -> None:
    tasks = [asyncio.create_task(fleet.generate(greedy(f"c{i}", 8), deadline=END)) for i in range(12)]
    while fleet.waiting < 12 - ON_ENGINE:
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in results] == [True, False] * 6
    assert fleet.waiting == 0
    assert set(fleet.outstanding.values()) == {0}


async def test_a_sessions_next_turn_goes_before_new_requests(fleet: Fleet, slow: None) -> None:
    session = RoutingContext(session="s")
    first = await fleet.generate(greedy("first", 4), deadline=END, routing=session)
    ended: list[str] = []

    async def ask(name: str, routing: RoutingContext) -> None:
        await fleet.generate(greedy(name, 30), deadline=END, routing=routing)
        ended.append(name)

    new = [asyncio.create_task(ask(f"new{i}", RoutingContext())) for i in range(3 * ON_ENGINE)]
    await asyncio.sleep(0)
    await ask("turn", session)
    assert len(ended) <= 2 * ON_ENGINE
    await asyncio.gather(*new)
    assert first.output_ids


async def test_headroom_is_all_of_the_cache_without_requests(fleet: Fleet) -> None:
    [(name, tokens)] = fleet.headroom.items()
    capacity = fleet.replicas.by_name[name].info.cache_tokens
    assert capacity is not None
    assert tokens is not None
    assert 0.9 * capacity < tokens <= capacity
    assert len(PROMPT) < tokens
