"""A channel to the weight loader of a server on this host, for the many orders of one publish.

An order by HTTP takes a few milliseconds on its way through SGLang's processes. So the first order of a publish also
names a Unix socket. The loader of each rank connects to it, and takes the later orders from there, until the channel
ends. While a channel is open, SGLang does nothing else. So this process closes a channel that has had no order for
IDLE_SECONDS.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from millrace.engines.sglang.payload import order_payloads
from millrace.errors import EngineFailed, EngineTimeout

IDLE_SECONDS = 0.2
END_SECONDS = 10.0  # for the answer to the first order, when the ranks have no order left
HTTP_SECONDS = 24 * 3600.0  # more than a publish takes; each order has its own deadline

Order = Callable[[Sequence[str], float], Awaitable[None]]  # sends the payload of each rank by HTTP, within a deadline
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NoChannel(Exception):
    """The loader can't connect to a socket of this process, for instance because it runs in another container."""


class Channel:
    """One channel. `open` sends the first order, and `wait` waits for it; `send` sends each later one.

    engine: the server's name. ranks: how many it has. order: sends the first order.
    """

    def __init__(self, engine: str, ranks: int, order: Order) -> None:
        self._engine, self._ranks, self._order = engine, ranks, order
        self._connections: dict[int, Connection] = {}
        self._connected = asyncio.Event()
        self._writing, self._reading = asyncio.Lock(), asyncio.Lock()
        self._under_way = 0
        self._first: asyncio.Task[None] | None = None  # the first order; its answer comes when the channel has ended
        self._idle: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether it takes orders."""
        return bool(self._connections) and self._first is not None and not self._first.done()

    async def open(self, payloads: Sequence[str], deadline: float) -> None:
        """Send the first order of each rank, and wait until all ranks are connected.

        Raises NoChannel if they can't connect; no rank has done its order then. Raises what `order` raises, and
        EngineTimeout after `deadline` seconds.
        """
        folder = Path(tempfile.mkdtemp(prefix="millrace-"))  # only this user may enter it
        server = await asyncio.start_unix_server(self._join, folder / "orders")
        connected = asyncio.create_task(self._connected.wait())
        try:
            place = str(folder / "orders")
            heads = [{"channel": place, "rank": rank, "order": one} for rank, one in enumerate(payloads)]
            first = order_payloads([orjson.dumps(head).decode() for head in heads])
            self._first = asyncio.create_task(self._send_first(first))
            self._first.add_done_callback(lambda task: task.cancelled() or task.exception())  # nothing may wait for it
            await asyncio.wait({connected, self._first}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if self._first.done():
                self._first.result()
                raise NoChannel
            if not connected.done():
                raise EngineTimeout(self._engine, f"its weight loader did not connect within {deadline:.1f} s")
        except BaseException:
            self.release()
            raise
        finally:
            connected.cancel()
            server.close()
            shutil.rmtree(folder, ignore_errors=True)

    async def send(self, payloads: Sequence[str], deadline: float) -> None:
        """Send the order of each rank, and wait until all have done it. Orders are done one after the other.

        Raises EngineFailed if a rank has ended, and EngineTimeout after `deadline` seconds. The channel then ends.
        """
        await self._ended(self._done(payloads), deadline)

    async def wait(self, deadline: float) -> None:
        """Wait until all ranks have done the order that opened the channel. Raises as `send` does."""
        await self._ended(self._read(), deadline)

    async def _ended(self, order: Coroutine[None, None, None], deadline: float) -> None:
        """Wait for an order, which is under way meanwhile. Raises as `send` does."""
        assert self._first is not None
        self._under_way += 1
        if self._idle is not None:
            self._idle.cancel()
        done = asyncio.create_task(order)
        try:
            await asyncio.wait({done, self._first}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if done.done() and done.exception() is None:
                return
            if not done.done() and not self._first.done():
                raise EngineTimeout(self._engine, f"its weight loader did not answer within {deadline:.1f} s")
            self.release()  # the other ranks end too
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await asyncio.shield(self._first)  # it says why, if the server has ended
            raise EngineFailed(self._engine, "its weight loader has ended; see its log")
        except BaseException:
            self.release()
            raise
        finally:
            done.cancel()
            self._under_way -= 1
            if not self._under_way and self.is_open:
                self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.release)

    async def end(self) -> None:
        """Let the ranks go, and wait until the server is free for other calls. Raises what the first order raises."""
        self.release()
        if self._first is None:
            return
        try:
            async with asyncio.timeout(END_SECONDS):
                await asyncio.shield(self._first)
        except TimeoutError:
            raise EngineTimeout(
                self._engine, f"its weight loader did not end its orders within {END_SECONDS:.0f} s"
            ) from None
        self._first = None

    def release(self) -> None:
        """Let the ranks go, which ends the first order."""
        if self._idle is not None:
            self._idle.cancel()
        for _, writer in self._connections.values():
            writer.close()
        self._connections = {}

    def close(self) -> None:
        """Let the ranks go, and do not wait for the answer to the first order."""
        self.release()
        if self._first is not None:
            self._first.cancel()

    async def _send_first(self, payloads: Sequence[str]) -> None:
        await self._order(payloads, HTTP_SECONDS)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a rank's connection, which begins with its number."""
        try:
            rank = int.from_bytes(await reader.readexactly(4), "big")
        except asyncio.IncompleteReadError:
            writer.close()
            return
        self._connections[rank] = reader, writer
        if len(self._connections) == self._ranks:
            self._connected.set()

    async def _done(self, payloads: Sequence[str]) -> None:
        """Write an order to each rank, and read that it is done. Raises OSError or EOFError if a rank is gone."""
        async with self._writing:
            for rank, payload in enumerate(payloads):
                content = payload.encode()
                self._connections[rank][1].writelines((len(content).to_bytes(8, "big"), content))
            for _, writer in list(self._connections.values()):
                await writer.drain()
        await self._read()

    async def _read(self) -> None:
        """Read from each rank that an order is done. Raises as `_done` does."""
        async with self._reading:  # a lock is fair, so this is the order's own answer
            for rank in range(self._ranks):
                await self._connections[rank][0].readexactly(1)


class Orders:
    """Sends orders to the weight loader of one server: by a channel if it is on this host, and by HTTP otherwise.

    engine: the server's name. by_channel: whether to try a channel. order: sends an order by HTTP.
    """

    def __init__(self, engine: str, order: Order, *, by_channel: bool) -> None:
        self._engine, self._order, self._by_channel = engine, order, by_channel
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()

    async def send(self, payloads: Sequence[str], deadline: float) -> None:
        """Send the order of each rank, and wait until all have done it. Several may be under way."""
        ends = time.monotonic() + deadline
        channel, opened = await self._open(payloads, ends) if self._by_channel else (None, False)
        if channel is None:
            await self._order(payloads, ends - time.monotonic())
        elif opened:
            await channel.wait(ends - time.monotonic())
        else:
            await channel.send(payloads, ends - time.monotonic())

    def release(self) -> None:
        """Let the server do other things. No order may be under way."""
        if self._channel is not None:
            self._channel.release()

    async def end(self) -> None:
        """Let the server do other things, and wait until it can. Raises the error with which the orders have ended."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.end()

    def close(self) -> None:
        """Let the server go, without waiting for it."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _open(self, payloads: Sequence[str], ends: float) -> tuple[Channel | None, bool]:
        """Return the open channel, and whether these orders have opened it. Without one, the loader can't connect."""
        async with self._opening:
            if self._channel is not None and self._channel.is_open:
                return self._channel, False
            await self.end()
            channel = Channel(self._engine, len(payloads), self._order)
            try:
                await channel.open(payloads, ends - time.monotonic())
            except NoChannel:
                self._by_channel = False
                return None, False
            self._channel = channel
            return channel, True
