"""Requests over raw sockets, so that a test decides where a connection breaks."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from millrace.config.gateway import GatewayConfig
from millrace.gateway import serve_gateway
from millrace.gateway.gateway import Gateway, OpenEpisode
from tests.gateway.formats import format_of
from tests.gateway.scripted import ScriptedFleet

KEY = "the gateway's key"
QUESTION = {"role": "user", "content": "1 + 1?"}
END = 30.0


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(END):
        while not condition():
            await asyncio.sleep(0.002)


class Engine(ScriptedFleet):
    """An engine that waits at each answer, or at each token of a stream, until the test lets it go on.

    steps: how often it may go on. answers: what it says, one after the other.
    """

    def __init__(self, name: str = "qwen3") -> None:
        turns = format_of(name)
        super().__init__(turns.chat.tokenizer, turns.stop_token_ids[0], self._say, pace=self._step)
        self.turns, self.waiting, self.said = turns, 0, 0
        self.steps = asyncio.Semaphore(0)

    def let_go(self, steps: int = 1_000_000) -> None:
        for _ in range(min(steps, 10_000)):
            self.steps.release()

    async def _say(self, _: str) -> str:
        self.said += 1
        text = f"Answer {self.said} is " + "two " * 20
        await self._step()
        return text

    async def _step(self) -> None:
        self.waiting += 1
        try:
            await self.steps.acquire()
        finally:
            self.waiting -= 1


@dataclass
class Wire:
    """One connection to the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(
        self, path: str, body: object, headers: Mapping[str, str] | None = None, method: str = "POST"
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: gateway", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """The status and the headers of the response."""
        text = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), END)).decode()
        first, *lines = text.strip().split("\r\n")
        return int(first.split()[1]), {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}

    async def response(self) -> tuple[int, Any]:
        """The whole response: its status, and its JSON, or the events of a stream."""
        status, headers = await self.head()
        if "content-length" in headers:
            return status, json.loads(await self.reader.readexactly(int(headers["content-length"])) or b"null")
        events = []
        while line := await self.event():
            events.append(line)
        return status, events

    async def event(self) -> bytes:
        """The next event of a stream; empty after the last one."""
        size = int(await asyncio.wait_for(self.reader.readline(), END), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    def cut(self) -> None:
        """Breaks the connection, as a kernel does for a process that was killed."""
        self.writer.transport.abort()


@dataclass
class Served:
    """A gateway, its scripted engine, and one open episode."""

    gateway: Gateway
    engine: Engine
    opened: OpenEpisode

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        parts = urlsplit(self.gateway.url)
        wire = Wire(*await asyncio.open_connection(parts.hostname, parts.port))
        try:
            yield wire
        finally:
            wire.cut()

    @property
    def path(self) -> str:
        return urlsplit(self.opened.base_url).path + "/v1/chat/completions"

    async def ask(
        self, body: object, headers: Mapping[str, str] | None = None, path: str | None = None
    ) -> tuple[int, Any]:
        """Sends a request on a connection of its own, and returns the whole response."""
        async with self.wire() as wire:
            await wire.send(path or self.path, body, headers)
            return await wire.response()

    def control(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def served(config: GatewayConfig | None = None, engine: Engine | None = None) -> AsyncIterator[Served]:
    """A gateway on a port, with an open episode."""
    engine = engine or Engine()
    async with serve_gateway(engine, engine.turns, key=KEY, config=config) as gateway:  # type: ignore[arg-type]
        yield Served(gateway, engine, gateway.open_episode({"task": 1}))


def in_folder(folder: Path) -> GatewayConfig:
    return GatewayConfig(folder=folder)
