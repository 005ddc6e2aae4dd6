"""The runs that a page shows, their files and indices, and the threads that read them."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millrace.errors import MonitorError
from millrace.imports import needs_extra
from millrace.viewer.runs import RunFiles, runs_below

if TYPE_CHECKING:
    from millrace.viewer.index import SampleIndex

MOST_INDICES = 4  # runs whose samples are in memory at once
DEADLINE = 20.0  # seconds for files to be read
LOOK_AGAIN = 5.0  # seconds after which new runs are looked for
T = TypeVar("T")


@dataclass(slots=True)
class Site:
    """What the page's routes answer from. Close it after use.

    runs: the folders of runs, by name. below: a folder in which new runs may appear. live: whether the server also has
    the state of a fleet (`/fleet`).
    """

    runs: Mapping[str, Path]
    below: Path | None = None
    live: bool = False
    _files: dict[str, RunFiles] = field(default_factory=dict)
    _indices: "OrderedDict[str, SampleIndex]" = field(default_factory=OrderedDict)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)
    _looked_at: float = field(default_factory=time.monotonic)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "runs"))

    async def close(self) -> None:
        """End all threads and tasks."""
        indices = [index.close() for index in self._indices.values()]
        self._indices.clear()
        await asyncio.gather(*indices, *self._closing)  # each has a deadline
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def summaries(self) -> list[dict[str, Any]]:
        """Return a summary of each run. Raises MonitorError if the files are not read in time."""
        if self.below is not None and time.monotonic() - self._looked_at > LOOK_AGAIN:
            self._looked_at = time.monotonic()
            below = self.below
            self.runs = {**self.runs, **await self._threaded(lambda: runs_below(below))}
        files = [self._files_of(name, folder) for name, folder in self.runs.items()]

        def read() -> list[dict[str, Any]]:
            for one in files:
                one.refresh()
            return [one.summary() for one in files]

        return await self._threaded(read)

    async def of_run(self, name: str, answer: Callable[[RunFiles], T], *, events: bool = False) -> T:
        """Return what `answer` says of a run whose files have just been read, events.jsonl if it needs `events`.

        Raises MonitorError if they are not read in time, or KeyError if there is no such run.
        """
        files = self._files_of(name, self.runs[name])

        def read() -> T:
            files.refresh(events=events)
            return answer(files)

        return await self._threaded(read)

    def index(self, name: str) -> "SampleIndex":
        """Return the index of a run's samples, which has begun to read new files.

        Raises KeyError if there is no such run, and ConfigError if DuckDB is not installed.
        """
        folder = self.runs[name]
        index = self._indices.get(name)
        if index is None:
            with needs_extra("samples"):
                from millrace.viewer.index import SampleIndex
            index = self._indices[name] = SampleIndex(folder / "samples")
            while len(self._indices) > MOST_INDICES:
                _, oldest = self._indices.popitem(last=False)
                closing = asyncio.create_task(oldest.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        self._indices.move_to_end(name)
        index.fill()
        return index

    def _files_of(self, name: str, folder: Path) -> RunFiles:
        if name not in self._files:
            self._files[name] = RunFiles(name, folder)
        return self._files[name]

    async def _threaded(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(DEADLINE):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise MonitorError(f"the run's files were not read within {DEADLINE:g} s") from None
