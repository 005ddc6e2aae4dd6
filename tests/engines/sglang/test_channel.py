"""The channel to the weight loader's ranks. A rank is a thread that runs the extension's own `serve`."""

import asyncio
import base64
import importlib
import pickle
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import orjson
import pytest

from millrace.engines.opcodes import PROTOCOL, STOP, encode
from millrace.engines.sglang import channel as sender
from millrace.engines.sglang.channel import Orders
from millrace.engines.stock.launching import EXTENSION
from millrace.errors import EngineFailed, EngineTimeout, EngineUnreachable

DEADLINE = 20.0
RANKS = 2


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXTENSION))
    return importlib.import_module("millrace_sglang.channel")


def payload(text: str) -> str:
    return base64.b64encode(PROTOCOL + encode(text) + STOP).decode()


class Server:
    """What SGLang does with an order by HTTP: each rank gets its own, and the answer comes when all are done.

    done: what each rank has done, in order. by_http: how many orders came so. do: what a rank does with an order.
    """

    def __init__(self, serving: ModuleType, *, reachable: bool = True) -> None:
        self._serving, self._reachable = serving, reachable
        self.done: list[list[str]] = [[] for _ in range(RANKS)]
        self.by_http, self.ended = 0, asyncio.Event()
        self.do: Callable[[int, str], None] = lambda rank, text: self.done[rank].append(text)
        self.orders = Orders("sglang-0", self.order, by_channel=True)

    async def order(self, payloads: Sequence[str], deadline: float) -> None:
        self.by_http += 1
        self.ended.clear()
        async with asyncio.timeout(deadline):
            await asyncio.gather(*(asyncio.to_thread(self._load, rank, one) for rank, one in enumerate(payloads)))
        self.ended.set()

    def _load(self, rank: int, one: str) -> None:
        content = base64.b64decode(one)
        if b"channel" not in content:
            self._do(rank, one)
            return
        head = orjson.loads(content[content.index(b"{") : content.rindex(b"}") + 1])
        path = head["channel"] if self._reachable else head["channel"] + "-elsewhere"
        try:
            self._serving.serve(path, head["rank"], head["order"], lambda order: self._do(rank, order))
        except OSError:
            assert not self._reachable
        except ZeroDivisionError:
            pass

    def _do(self, rank: int, order: str) -> None:
        self.do(rank, pickle.loads(base64.b64decode(order)))

    async def send(self, text: str, deadline: float = DEADLINE) -> None:
        await self.orders.send([payload(f"{text} of {rank}") for rank in range(RANKS)], deadline)

    def require_done(self, texts: Sequence[str]) -> None:
        assert self.done == [[f"{text} of {rank}" for text in texts] for rank in range(RANKS)]


async def test_later_orders_go_by_the_channel_in_their_order(serving: ModuleType) -> None:
    server, long = Server(serving), "x" * 3_000_000  # more than a socket holds
    texts = [f"{number} {long}" for number in range(6)]
    await asyncio.gather(*map(server.send, texts))
    await server.orders.end()
    server.require_done(texts)
    assert server.by_http == 1
    assert server.ended.is_set()


async def test_an_order_returns_when_all_ranks_have_done_it(serving: ModuleType) -> None:
    server, go = Server(serving), asyncio.Event()
    await server.send("first")
    loop = asyncio.get_running_loop()

    def wait(rank: int, text: str) -> None:
        if rank == 1:
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        server.done[rank].append(text)

    server.do = wait
    sending = asyncio.create_task(server.send("second"))
    while len(server.done[0]) < 2:
        await asyncio.sleep(0.001)
    assert not sending.done()
    go.set()
    await sending
    server.require_done(["first", "second"])
    await server.orders.end()


async def test_a_channel_that_nobody_uses_lets_the_server_go(serving: ModuleType) -> None:
    server = Server(serving)
    await server.send("first")
    async with asyncio.timeout(DEADLINE):
        await server.ended.wait()
    await server.send("second")
    await server.orders.end()
    server.require_done(["first", "second"])
    assert server.by_http == 2


async def test_without_a_way_to_the_socket_orders_go_by_http(serving: ModuleType) -> None:
    server = Server(serving, reachable=False)
    for text in ("first", "second"):
        await server.send(text)
    server.require_done(["first", "second"])
    assert server.by_http == 3  # the first one also tried a channel
    await server.orders.end()


async def test_a_rank_that_fails_ends_the_orders(serving: ModuleType) -> None:
    server = Server(serving)
    await server.send("first")

    def fail(rank: int, text: str) -> None:
        if rank == 1:
            raise ZeroDivisionError(text)
        server.done[rank].append(text)

    good, server.do = server.do, fail
    with pytest.raises(EngineFailed, match="sglang-0: its weight loader has ended; see its log"):
        await server.send("second")
    server.do = good
    await server.send("third")
    assert server.by_http == 2
    await server.orders.end()


async def test_a_rank_that_does_not_answer_in_time(serving: ModuleType) -> None:
    server, go = Server(serving), asyncio.Event()
    await server.send("first")
    loop = asyncio.get_running_loop()

    def wait(rank: int, text: str) -> None:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()

    server.do = wait
    began = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"its weight loader did not answer within 0\.3 s"):
        await server.send("second", 0.3)
    assert time.monotonic() - began < sender.END_SECONDS
    go.set()
    await server.orders.end()
    assert server.ended.is_set()


async def test_a_server_that_dies_is_named(serving: ModuleType) -> None:
    server, died = Server(serving), asyncio.Event()
    inner = server.order

    async def order(payloads: Sequence[str], deadline: float) -> None:
        inside = asyncio.create_task(inner(payloads, deadline))
        await died.wait()
        inside.add_done_callback(lambda task: task.cancelled() or task.exception())
        raise EngineUnreachable("sglang-0", "it has closed the connection", sent=True)

    server.orders = Orders("sglang-0", order, by_channel=True)
    await server.send("first")
    died.set()
    with pytest.raises(EngineUnreachable, match="it has closed the connection"):
        await server.send("second")
    server.orders.close()


async def test_closing_lets_the_ranks_go(serving: ModuleType) -> None:
    server = Server(serving)
    await server.send("first")
    server.orders.close()
    async with asyncio.timeout(DEADLINE):
        while [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await asyncio.sleep(0.001)
