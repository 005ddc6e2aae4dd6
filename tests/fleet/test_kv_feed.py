"""KV cache events of an engine reach the router over a real socket."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
import zmq.asyncio

from millrace.engines.stock.kv_events import new_endpoint
from millrace.fleet.kv_feed import KVEventFeeds
from millrace.fleet.replica_state import Snapshot
from millrace.fleet.routing import Choice, RoutingPolicy, Why
from tests.fleet.test_routing import asked, long, replicas

DEADLINE = 20.0
PROMPT = long(0, 3)


class Publisher:
    """Publishes KV cache events as an engine does."""

    def __init__(self) -> None:
        self.endpoint = new_endpoint()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.XPUB)  # like PUB, but it reports new subscribers
        self._socket.bind(self.endpoint)

    async def until_heard(self) -> None:
        async with asyncio.timeout(DEADLINE):
            assert await self._socket.recv() == b"\x01"

    async def say(self, number: int, *events: object) -> None:
        await self.send(b"", number.to_bytes(8, "big"), msgpack.packb([1.0, list(events), 0]))

    async def send(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    def close(self) -> None:
        self._context.destroy(linger=0)
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def stored(prompt: tuple[int, ...], size: int = 16) -> object:
    ends = range(size, len(prompt) + 1, size)
    hashes = [hash(prompt[:end]) for end in ends]
    return {"type": "BlockStored", "block_hashes": hashes, "token_ids": list(prompt), "block_size": size}


@pytest.fixture
def router() -> RoutingPolicy:
    router = RoutingPolicy()
    # With this, the router does not learn from the prompts that it routes to e1.
    router.follow("e1")
    return router


@pytest.fixture
def snapshot() -> Snapshot:
    return replicas(2)


@pytest_asyncio.fixture
async def publisher(router: RoutingPolicy) -> AsyncIterator[Publisher]:
    """The publisher of engine e0."""
    publisher, feeds = Publisher(), KVEventFeeds(router)
    try:
        async with asyncio.timeout(2 * DEADLINE), feeds.listening("e0", publisher.endpoint):
            await publisher.until_heard()
            yield publisher
            ended = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - ended < 1.0
    finally:
        feeds.close()
        publisher.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def drawn(router: RoutingPolicy, snapshot: Snapshot, prompt: tuple[int, ...] = PROMPT) -> bool:
    """Whether the prompt goes to e0 although e1 has less to do."""
    choice = router.choose(snapshot, Counter(e0=10, e1=0), asked(prompt))
    return choice == Choice("e0", Why.PREFIX)


async def test_an_engine_draws_the_prompts_that_it_reports(
    router: RoutingPolicy, snapshot: Snapshot, publisher: Publisher
) -> None:
    assert not drawn(router, snapshot)
    await publisher.say(0, stored(PROMPT))
    await until(lambda: drawn(router, snapshot))
    await publisher.say(1, {"type": "AllBlocksCleared"}, stored(long(5000, 3)))
    await until(lambda: drawn(router, snapshot, long(5000, 3)))
    assert not drawn(router, snapshot)


async def test_blocks_before_a_gap_are_forgotten(
    router: RoutingPolicy, snapshot: Snapshot, publisher: Publisher
) -> None:
    await publisher.say(7, stored(PROMPT))  # this is the first message that is heard, so there is no gap before it
    await until(lambda: drawn(router, snapshot))
    await publisher.say(9, stored(long(5000, 3)))
    await until(lambda: drawn(router, snapshot, long(5000, 3)))
    assert not drawn(router, snapshot)


@pytest.mark.parametrize("frames", [(b"", b"\0" * 8, b"\xc1"), (b"alone",)])
async def test_an_engine_with_unreadable_events_is_known_by_the_prompts_that_it_gets(
    frames: tuple[bytes, ...],
    router: RoutingPolicy,
    snapshot: Snapshot,
    publisher: Publisher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await publisher.send(*frames)
    await until(lambda: bool(caplog.messages))
    [message] = caplog.messages
    assert "routing to e0 uses the prompts sent to it, since its KV cache events can't be read" in message
    await publisher.say(1, stored(PROMPT))
    sent = router.choose(snapshot, Counter(e0=0, e1=10), asked(PROMPT))
    assert sent == Choice("e0", Why.LEAST_LOADED)
    assert drawn(router, snapshot)


async def test_others_work_while_a_long_prompt_is_taken_in(
    router: RoutingPolicy, snapshot: Snapshot, publisher: Publisher
) -> None:
    prompt = long(0, 512)
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += bool(router._cached._blocks["e0"])  # counts turns once the router has begun

    working = asyncio.create_task(work())
    await publisher.say(0, stored(prompt, size=1))
    async with asyncio.timeout(DEADLINE):
        while len(router._cached._blocks["e0"]) < len(prompt):
            await asyncio.sleep(0)
    working.cancel()
    assert turns >= len(prompt) // 256 - 1
    assert drawn(router, snapshot, prompt)


async def test_an_engine_that_has_left_draws_no_more(router: RoutingPolicy, snapshot: Snapshot) -> None:
    publisher, feeds = Publisher(), KVEventFeeds(router)
    try:
        async with feeds.listening("e0", publisher.endpoint):
            await publisher.until_heard()
            await publisher.say(0, stored(PROMPT))
            await until(lambda: drawn(router, snapshot))
        assert not drawn(router, snapshot)
        assert "e0" not in router._cached
        async with feeds.listening("e0", None):
            assert "e0" not in router._cached
    finally:
        feeds.close()
        publisher.close()
