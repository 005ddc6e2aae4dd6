"""An event loop in its own thread, through which synchronous code calls async code."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from millrace.errors import ArgumentError, NoEngineError

T = TypeVar("T")
CANCEL_SECONDS = 10.0  # for a cancelled coroutine to end; it may abort requests on engines first


class Portal:
    """An event loop in its own thread that runs coroutines for other threads.

        with Portal() as portal:
            result = portal.call(fetch())

    The thread ends with the `with` block, which cancels what still runs.
    """

    _closed = False

    def __enter__(self) -> "Portal":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="millrace-portal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result. Ctrl-C while waiting cancels the coroutine.

        Raises the coroutine's errors, NoEngineError after the `with` block has ended, and ArgumentError if the event
        loop's own thread calls it, as a generator of requests may do.
        """
        if self._closed:
            coroutine.close()
            raise NoEngineError.closed()
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise ArgumentError(
                "code that the event loop runs made a blocking call, which the loop would wait for forever"
            )
        ended = threading.Event()

        async def run() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(CANCEL_SECONDS)
            raise

    async def _end(self) -> None:
        """Cancel the loop's other tasks, whose callers would wait forever for a loop that has stopped."""
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in rest:
                task.cancel()
            await asyncio.wait(rest, timeout=CANCEL_SECONDS)
        await self._loop.shutdown_asyncgens()
