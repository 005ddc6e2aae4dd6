"""One server that consists of several processes: an engine over several nodes, each of which needs all the others."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from millrace.launch.process import Server, until_healthy

T = TypeVar("T")


class Nodes:
    """The processes of one server, with the interface of a single one. Its creator must call `end`.

    processes: one for each. release: called after all of them have ended, each time that `end` is called.
    """

    def __init__(
        self, name: str, processes: Sequence[Server], release: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.name = name
        self.processes = tuple(processes)
        self._release = release
        self._first: Server | None = None  # the first node that ended, while all others were running

    @property
    def running(self) -> bool:
        """Whether all nodes run."""
        return all(process.running for process in self.processes)

    @property
    def hosts(self) -> Collection[str]:
        """The addresses of the hosts of all nodes."""
        return {host for process in self.processes for host in process.hosts}

    async def until_healthy(self, healthy: Callable[[], Awaitable[bool]], *, deadline: float) -> None:
        """Call `healthy` until it returns true.

        Raises LaunchError if a node ends first, or after `deadline` seconds.
        """
        await until_healthy(self, healthy, deadline=deadline)

    async def wait(self) -> None:
        """Wait until a node has ended, then end the others: they would hang in their next collective operation."""
        waits = {asyncio.create_task(process.wait()): process for process in self.processes}
        done = await first_done(waits)
        self._note_end(next(process for task, process in waits.items() if task in done))
        await self._end_all()

    async def notice(self) -> float:
        """Wait for a notice that the host of a node goes away. Return the seconds until then."""
        done = await first_done([asyncio.create_task(process.notice()) for process in self.processes])
        return min(task.result() for task in done)

    async def avoid(self, host: str, seconds: float) -> None:
        """Start nothing more on the host of a node. Raises LaunchError. See `Server.avoid`."""
        there = [process for process in self.processes if host in process.hosts]
        await asyncio.gather(*(process.avoid(host, seconds) for process in there))

    async def end(self) -> None:
        """End all nodes. Raises LaunchError if a node can't be ended, after trying them all."""
        try:
            await self._end_all()
        finally:
            if self._release is not None:
                await self._release()

    async def _end_all(self) -> None:
        if (ended := self._ended()) is not None:
            self._note_end(ended)
        results = await asyncio.gather(*(process.end() for process in self.processes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def describe_end(self) -> str:
        """Return a description of the node that ended first and of how it ended."""
        ended = self._first or self._ended()
        return f"{self.name} runs" if ended is None else ended.describe_end()

    def log_tail(self) -> str:
        """Return the last lines of the log of the node that ended first, or of all nodes while all are running."""
        ended = self._first or self._ended()
        return "\n".join(process.log_tail() for process in (self.processes if ended is None else (ended,)))

    def _ended(self) -> Server | None:
        return next((process for process in self.processes if not process.running), None)

    def _note_end(self, process: Server) -> None:
        self._first = self._first or process


async def first_done(tasks: Collection[asyncio.Task[T]]) -> set[asyncio.Task[T]]:
    """Wait until one or more of the tasks are done. Return these, and cancel the others."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done
