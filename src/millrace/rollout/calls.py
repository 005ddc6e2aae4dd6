"""Calls of the user's functions, each with a deadline.

Async functions run on the event loop. Sync functions run in daemon threads, so one that hangs keeps neither the event
loop nor the end of the process waiting.
"""

import asyncio
import contextvars
import inspect
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from millrace.errors import MillraceError

log = logging.getLogger(__name__)

NOTHING: Mapping[str, object] = {}
MOST_THREADS = 32
GRACE = 1.0  # seconds in which an async function must end after it was cancelled


class CallTimeout(MillraceError):
    """A function did not return within its deadline, or no thread was free to run it."""


class Worker:
    """A daemon thread that runs functions one after another."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def rename(self, name: str) -> None:
        """Give the thread another name, for debuggers."""
        self._thread.name = name

    def run(self, function: Callable[[], object]) -> asyncio.Future[object]:
        """Run a function after those before it, and return the future of its result."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        future: asyncio.Future[object] = loop.create_future()

        def job() -> None:
            try:
                finish = partial(_settle, future, context.run(function))
            except BaseException as error:  # the caller gets it
                finish = partial(_settle, future, error=error)
            with suppress(RuntimeError):  # the event loop has ended, and with it what waited for the result
                loop.call_soon_threadsafe(finish)

        self._jobs.put(job)
        return future

    def end(self) -> None:
        """Let the thread end after the functions that it was given."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Calls:
    """Runs the user's functions with deadlines, at most `most` of the sync ones at a time.

    stuck: how many sync calls have passed their deadlines, or were given up, and still run.
    """

    def __init__(self, most: int = MOST_THREADS) -> None:
        self.most = most
        self.stuck = 0
        self._free = asyncio.Semaphore(most)
        self._idle: list[Worker] = []  # starting a thread keeps the event loop waiting

    def __del__(self) -> None:
        for worker in self._idle:
            worker.end()

    async def run(
        self, function: Callable[..., object], arguments: Mapping[str, object] = NOTHING, *, deadline: float
    ) -> Any:
        """Return what the function returns for these arguments.

        Raises CallTimeout if it does not return within `deadline` seconds, and whatever the function raises. Cancelling
        gives the call up: an async function is cancelled, and a sync one counts as stuck until it returns.
        """
        if is_async(function):
            return await _awaited(function(**arguments), deadline)  # type: ignore[arg-type]
        ends = asyncio.get_running_loop().time() + deadline
        self.require_threads()
        try:
            async with asyncio.timeout(deadline):
                await self._free.acquire()
        except TimeoutError:
            raise CallTimeout(
                f"it did not begin within {deadline:g} s, because {self.most} other calls were running"
            ) from None
        worker = self._worker(f"call of {_name(function)}")
        future = worker.run(lambda: function(**arguments))

        def done(_: object) -> None:  # when the thread is done, however late
            self._idle.append(worker)
            self._free.release()

        future.add_done_callback(done)
        return await self.result(future, function, ends - asyncio.get_running_loop().time(), deadline)

    def _worker(self, name: str) -> Worker:
        if not self._idle:
            return Worker(name)
        worker = self._idle.pop()
        worker.rename(name)
        return worker

    async def result(
        self, future: asyncio.Future[object], function: Callable[..., object], left: float, deadline: float
    ) -> Any:
        """Return the result of a worker's function, within the `left` seconds of its deadline. A late one is stuck."""
        try:
            await asyncio.wait({future}, timeout=max(left, 0.0))
            if not future.done():
                raise CallTimeout(f"it did not return within {deadline:g} s")
            result = future.result()
        finally:
            if not future.done():
                self.stuck += 1
                if self.stuck == self.most:
                    log.warning(
                        "%d calls of rewards, tools or environments hang, the last of them in %s; no more sync "
                        "functions are started. Give what they wait for a timeout, or make them async",
                        self.most,
                        _name(function),
                    )
                future.add_done_callback(self._returned)
        return await _awaited(result, deadline) if inspect.isawaitable(result) else result

    def _returned(self, future: asyncio.Future[object]) -> None:
        self.stuck -= 1
        if not future.cancelled():
            future.exception()  # which nothing waits for any more

    def require_threads(self) -> None:
        """Raise CallTimeout if so many calls hang that no more threads are started."""
        if self.stuck >= self.most:
            raise CallTimeout(f"it can't begin: {self.stuck} earlier calls hang, and no more threads are started")


def _name(function: Callable[..., object]) -> str:
    return str(getattr(function, "__qualname__", function))


def is_async(function: Callable[..., object]) -> bool:
    """Return whether calling the function gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _awaited(awaitable: Awaitable[object], deadline: float) -> object:
    async def run() -> object:
        try:
            return await awaitable
        except (SystemExit, KeyboardInterrupt) as error:  # which would end the event loop
            raise _ordinary(error) from error

    task = asyncio.ensure_future(run())
    try:
        await asyncio.wait({task}, timeout=max(deadline, 0.0))
    finally:
        late = not task.done()
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
    if late:
        raise CallTimeout(f"it did not return within {deadline:g} s")
    if task.cancelled():
        raise RuntimeError("it cancelled itself")
    return task.result()


def _settle(future: asyncio.Future[object], result: object = None, error: BaseException | None = None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(_ordinary(error))


def _ordinary(error: BaseException) -> Exception:
    """Return an error that a future can carry: those that end programs and iterations become RuntimeErrors."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
