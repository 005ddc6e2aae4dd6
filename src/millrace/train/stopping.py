"""Ends a run early with a checkpoint, when a cluster is about to take its host away."""

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of Kubernetes, Slurm and torchrun; of Slurm's --signal
# Signals that come within so many seconds are one request. When Slurm ends a job, it sends SIGTERM once or twice,
# and the script of the job, which gets it too, may pass it on as SIGUSR1.
TOGETHER_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Stop:
    """A request to end a run with a checkpoint.

    signal: the signal that asked for it, on this rank or another; None if none did. saves: whether the run is in its
    steps, so that there is something to save.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.saves = False
        self._asked_at = 0.0
        self._asked = asyncio.Event()

    def ask(self, number: signal.Signals) -> None:
        """Ask the run to end. Only the first request counts."""
        if self.signal is None:
            self.signal, self._asked_at = number, time.monotonic()
            self._asked.set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGUSR1 ask while the block runs, in the task that calls this and in the main thread.

        The signal cancels the task instead if the run is not in its steps yet, or if it comes later than the first one.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def signalled(number: signal.Signals) -> None:
            if self.signal is not None and time.monotonic() - self._asked_at < TOGETHER_SECONDS:
                return
            if self.saves and self.signal is None:
                later = f"another signal after {TOGETHER_SECONDS:.0f} s ends it at once"
                logger.warning("%s: the run saves a checkpoint and ends; %s", number.name, later)
            else:
                task.cancel()
            self.ask(number)

        for number in SIGNALS:
            loop.add_signal_handler(number, signalled, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def unless_asked(self, work: Coroutine[None, None, T]) -> T | None:
        """Return the result of `work`. If the run is asked to end before, cancel the work and return None."""
        working, asked = asyncio.create_task(work), asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
            return None if asked.done() else await working
        finally:
            working.cancel()
            asked.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)
