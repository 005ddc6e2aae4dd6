"""The order in which hosts read a bucket: from the trainer, and from each other.

Each host that has the bucket sends it to one other host at a time. So the number of copies doubles in the time of one
copy (a binomial tree). If the network of the trainer's host is the limit, N hosts take about log2(N + 1) times as long
as one host, and not N times.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

LEAST_PATIENCE = 0.5  # seconds
PATIENCE = 2.0  # times the duration of the last copy

S = TypeVar("S")


class FanOut(Generic[S]):
    """The sources of one bucket. trainer: the first one. patience: seconds to wait for a source that is free."""

    def __init__(self, trainer: S, patience: float) -> None:
        self.trainer, self._patience = trainer, patience
        self._free: asyncio.Queue[S] = asyncio.Queue()
        self._free.put_nowait(trainer)
        self.slowest = 0.0  # seconds of the slowest copy that succeeded

    @asynccontextmanager
    async def source(self) -> AsyncIterator[S]:
        """Return a source that serves no other reader while the block runs. A source whose block fails is not used
        again, except the trainer.

        The trainer is returned, even if it serves others, when no source becomes free in time: a reader that hangs
        must not keep others from the bucket.
        """
        try:
            async with asyncio.timeout(self._patience):
                source = await self._free.get()
        except TimeoutError:
            yield self.trainer
            return
        begun = time.monotonic()
        try:
            yield source
        except BaseException:
            if source is self.trainer:
                self._free.put_nowait(source)
            raise
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self._free.put_nowait(source)

    def add(self, source: S) -> None:
        """Add a reader that has the bucket."""
        self._free.put_nowait(source)


def patience_after(seconds: float) -> float:
    """Return the patience for the bucket after one whose slowest copy took so many seconds."""
    return max(LEAST_PATIENCE, PATIENCE * seconds)
