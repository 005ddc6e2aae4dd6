"""An event loop in a thread of its own: how code without one calls code that needs one."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from millrace.errors import NoEngineError

T = TypeVar("T")


class Portal:
    """Runs coroutines for other threads. A context manager: the loop's thread ends with the block."""

    _closed = False

    def __enter__(self) -> "Portal":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="millrace-portal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. An interrupt while waiting (Ctrl-C) cancels the coroutine. Raises NoEngineError after
        the block has ended."""
        if self._closed:
            coroutine.close()
            raise NoEngineError.closed()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
