"""Several processes that are one server: an engine over several nodes, of which none can go on without the others."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from millrace.launch.process import ServerProcess, until_healthy


class Nodes:
    """The processes of one server, with the face of a single `ServerProcess`. Whoever makes it calls `end`."""

    def __init__(self, name: str, processes: Sequence[ServerProcess]) -> None:
        self.name = name
        self._processes = tuple(processes)
        self._first: ServerProcess | None = None  # that ended, while all the others ran

    @property
    def running(self) -> bool:
        """Whether all nodes run."""
        return all(process.running for process in self._processes)

    async def until_healthy(self, healthy: Callable[[], Awaitable[bool]], *, deadline: float) -> None:
        """Asks `healthy` until it says yes. Raises LaunchError when a node ends first or the deadline passes."""
        await until_healthy(self, healthy, deadline=deadline)

    async def wait(self) -> None:
        """Returns when a node has ended. The others are ended then, for they would hang in their next collective."""
        waits = {asyncio.create_task(process.wait()): process for process in self._processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._note_end(next(process for task, process in waits.items() if task in done))
        await self.end()

    async def end(self) -> None:
        """Ends all nodes. Raises LaunchError, after it has tried them all, when one can't be ended."""
        if (ended := self._ended()) is not None:
            self._note_end(ended)
        results = await asyncio.gather(*(process.end() for process in self._processes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def describe_end(self) -> str:
        """Which node ended first and how, in words."""
        ended = self._first or self._ended()
        return f"{self.name} runs" if ended is None else ended.describe_end()

    def log_tail(self) -> str:
        """The last lines of the log of the node that ended first, or of every node while all run."""
        ended = self._first or self._ended()
        return "\n".join(process.log_tail() for process in (self._processes if ended is None else (ended,)))

    def _ended(self) -> ServerProcess | None:
        return next((process for process in self._processes if not process.running), None)

    def _note_end(self, process: ServerProcess) -> None:
        self._first = self._first or process
