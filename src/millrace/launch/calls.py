"""Calls between processes over pipes: one line of JSON for each call, each answer and each message.

A call is `{"id": 1, "call": "reserve", ...}`. Its answer is `{"id": 1, "result": ...}` or `{"id": 1, "error": "..."}`.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

from millrace.errors import LaunchError

MOST_BYTES = 2**24  # in a line


class Writer(Protocol):
    """What takes the bytes of a call: a stream to another process."""

    def write(self, data: bytes) -> object:
        """Take the bytes, and send them."""


class Caller:
    """Sends calls to another process, and gives each its answer. who: that process in messages."""

    def __init__(self, who: str, to: Writer) -> None:
        self.who = who
        self._to = to
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.gone: str | None = None  # why no answer comes any more

    async def call(self, call: str, within: float, **arguments: object) -> Any:
        """Return the answer to a call. Raises LaunchError."""
        if self.gone is not None:
            raise LaunchError(self.gone)
        number = self._number = self._number + 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        try:
            self._to.write(json.dumps({"id": number, "call": call, **arguments}).encode() + b"\n")
            async with asyncio.timeout(within):
                return await answer
        except TimeoutError:
            raise LaunchError(f"{self.who} did not answer to {call} within {within:.0f} s") from None
        finally:
            self._open.pop(number, None)

    def answered(self, message: dict[Any, Any]) -> None:
        """Give an answer to its call. An answer whose call has passed its deadline is dropped."""
        call = self._open.get(message["id"])
        if call is None or call.done():
            return
        if "error" in message:
            call.set_exception(LaunchError(message["error"]))
        else:
            call.set_result(message["result"])

    def lose(self, why: str) -> None:
        """Fail all calls: the other process has ended."""
        self.gone = why
        for call in self._open.values():
            if not call.done():
                call.set_exception(LaunchError(why))


class Answerer:
    """Answers calls. Each public coroutine of a subclass is one call, and its arguments are the fields of the call."""

    def __init__(self, out: BinaryIO, who: str) -> None:
        self._out, self.who = out, who

    def say(self, **message: object) -> None:
        """Write one line."""
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    async def answer(self, line: bytes) -> None:
        """Carry out one call."""
        call = json.loads(line)
        number, name = call.pop("id"), call.pop("call")
        try:
            self.say(id=number, result=await getattr(self, name)(**call))
        except LaunchError as error:
            self.say(id=number, error=str(error))
        except Exception as error:  # whatever it is, the caller waits for an answer
            self.say(id=number, error=f"{self.who}: {name} failed: {self.said(error)}")

    def said(self, error: BaseException) -> str:
        """Return what an error says, in one line."""
        return f"{type(error).__name__}: {error}"

    async def serve(self, beside: Coroutine[Any, Any, None]) -> None:
        """Answer the calls of the standard input until it ends, and run `beside` meanwhile.

        Raises what `beside` raises, when the input has ended.
        """
        tasks: set[asyncio.Task[None]] = set()
        other = asyncio.create_task(beside)
        try:
            async for line in lines():
                task = asyncio.create_task(self.answer(line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            other.cancel()
            with suppress(asyncio.CancelledError):
                await other


async def ends_within(process: asyncio.subprocess.Process, seconds: float) -> bool:
    """Close the standard input of a process that answers calls. Return whether it ends within so many seconds."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        return False
    return True


async def lines() -> AsyncIterator[bytes]:
    """Yield the lines of the standard input."""
    reader = asyncio.StreamReader(limit=MOST_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line
