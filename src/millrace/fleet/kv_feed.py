"""What the engines publish of their KV caches, brought to the router."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from millrace.engines.stock.kv_events import MalformedEvents, decode
from millrace.fleet.routing import RoutingPolicy

if TYPE_CHECKING:
    import zmq.asyncio

MOST_BYTES = 64 * 2**20  # of one message

logger = logging.getLogger(__name__)


class KVEventFeeds:
    """One for each engine that publishes; `listening` is its owner, and `close` comes after all of them."""

    def __init__(self, router: RoutingPolicy) -> None:
        self._router = router
        self._context: zmq.asyncio.Context | None = None

    @asynccontextmanager
    async def listening(self, name: str, endpoint: str | None) -> AsyncIterator[None]:
        """As long as the block runs, an engine that publishes is routed to by what it says. Where that can't be read,
        by what is sent to it, as one that does not publish (None)."""
        if endpoint is None:
            yield
            return
        self._router.follow(name)
        feed = asyncio.create_task(self._feed(name, endpoint))
        try:
            yield
        finally:
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
            self._router.unfollow(name)

    def close(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)

    async def _feed(self, name: str, endpoint: str) -> None:
        import zmq.asyncio

        if self._context is None:
            self._context = zmq.asyncio.Context()
        try:
            with self._context.socket(zmq.SUB) as socket:
                socket.linger, socket.maxmsgsize = 0, MOST_BYTES
                socket.subscribe(b"")
                socket.connect(endpoint)
                await self._bring(name, socket)
        except (MalformedEvents, zmq.ZMQError) as error:
            self._router.unfollow(name)
            logger.error("requests go to %s by what was sent there, since its KV cache events fail: %s", name, error)

    async def _bring(self, name: str, socket: "zmq.asyncio.Socket") -> None:
        """For ever."""
        due: int | None = None
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3:
                raise MalformedEvents(f"a message of {len(frames)} parts, and not of topic, number and batch")
            number = int.from_bytes(frames[1], "big")
            if due not in (None, number):  # what was removed in between would stay known
                self._router.missed(name)
            due = number + 1
            for event in decode(frames[2]):
                self._router.learn(name, event)
                await asyncio.sleep(0)  # a long prompt is many
