"""The KV cache events of the engines, received over ZeroMQ and passed on to the routing policy."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from millrace.engines.stock.kv_events import MalformedEvents, decode
from millrace.fleet.routing import RoutingPolicy

if TYPE_CHECKING:
    import zmq.asyncio

MOST_BYTES = 64 * 2**20  # bytes of one message

logger = logging.getLogger(__name__)


class KVEventFeeds:
    """Subscriptions to KV cache events, one for each engine that publishes them. Call `close` after all have ended."""

    def __init__(self, router: RoutingPolicy) -> None:
        self._router = router
        self._context: zmq.asyncio.Context | None = None

    @asynccontextmanager
    async def listening(self, name: str, endpoint: str | None) -> AsyncIterator[None]:
        """Subscribe to the engine's events while the block runs.

        If the engine publishes none (`endpoint` is None) or its events can't be read, routing uses the prompts that are
        sent to it.
        """
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
        """Release ZeroMQ's resources."""
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
                await self._receive(name, socket)
        except (MalformedEvents, zmq.ZMQError) as error:
            self._router.unfollow(name)
            logger.error(
                "routing to %s uses the prompts sent to it, since its KV cache events can't be read: %s", name, error
            )

    async def _receive(self, name: str, socket: "zmq.asyncio.Socket") -> None:
        """Pass on the events of one engine, until cancelled."""
        due: int | None = None
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3:
                raise MalformedEvents(f"a message has {len(frames)} parts instead of three: topic, number and batch")
            number = int.from_bytes(frames[1], "big")
            if due not in (None, number):  # a block that was removed in between would stay known
                self._router.missed(name)
            due = number + 1
            for event in decode(frames[2]):
                self._router.learn(name, event)
                await asyncio.sleep(0)  # a long prompt brings many events
