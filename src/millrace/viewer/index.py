"""The samples of one run: their scalar columns in memory, and the rest in the run's Parquet files."""

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from millrace.errors import MonitorError
from millrace.viewer.query import COLUMNS, SHOWN, Page, Where

logger = logging.getLogger(__name__)
FILES_AT_ONCE = 32  # that one transaction adds
FILL_DEADLINE = 120.0  # seconds for FILES_AT_ONCE files
DEADLINE = 15.0  # seconds for a question
CLOSE_DEADLINE = 5.0
THREADS = 3  # one may fill while two questions are answered
SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "threads": 2,
    "memory_limit": "4GB",
    "autoinstall_known_extensions": False,  # which would ask another host
    "autoload_known_extensions": False,
}
NAME = re.compile(r"step-(\d+)(-rank\d+)?\.parquet")
NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
T = TypeVar("T")
Cursor = duckdb.DuckDBPyConnection


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample is: its file, and its row there."""

    path: Path
    row: int


@dataclass(frozen=True, slots=True)
class Known:
    """A file whose rows are in the table. signature: of its state when it was read."""

    number: int
    signature: tuple[int, int, int]


@dataclass(slots=True)
class Rows:
    """The rows of one page. total: samples in the table. matched: those that the condition is true of."""

    total: int
    matched: int
    columns: Sequence[str]
    rows: list[tuple[Any, ...]]


@dataclass(slots=True)
class SampleIndex:
    """An in-memory table of a run's samples, which `fill` brings up to date while questions are answered.

    folder: that of the Parquet files. Threads do all the work, and the event loop never waits for a file. The code that
    makes an index also closes it.
    """

    folder: Path
    looked: bool = False  # whether the folder has been looked through
    files: int = 0  # in the folder, as it was last seen
    trouble: str | None = None  # why the folder could not be looked through
    problems: dict[str, str] = field(default_factory=dict)  # of files that could not be read as they should, by name
    _known: dict[str, Known] = field(default_factory=dict)
    _numbers: dict[int, Path] = field(default_factory=dict)
    _filling: asyncio.Task[None] | None = None
    _closed: bool = False
    _asked: dict[Cursor, "Future[Any]"] = field(default_factory=dict)  # by the cursor that each has
    _lock: threading.Lock = field(default_factory=threading.Lock)

    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "samples"))
    _db: Cursor = field(default_factory=lambda: duckdb.connect(":memory:", config=SETTINGS))

    def __post_init__(self) -> None:
        columns = ", ".join(f'"{name}" {kind}' for name, kind in COLUMNS.items())
        self._db.execute(f"CREATE TABLE samples (file INTEGER, row BIGINT, {columns})")

    async def close(self) -> None:
        """End the filling and the questions. Those that wait then raise MonitorError."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        with self._lock:
            asked = dict(self._asked)
            for cursor in asked:
                cursor.interrupt()
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = [asyncio.wrap_future(future) for future in asked.values() if not future.done()]
        try:
            async with asyncio.timeout(CLOSE_DEADLINE):
                await asyncio.gather(*running, return_exceptions=True)
        except TimeoutError:  # it waits for a file system, and ends when that answers
            logger.warning("%s: a thread still reads after %g s", self.folder, CLOSE_DEADLINE)
            return
        self._db.close()

    @property
    def indexed(self) -> int:
        """The number of files whose rows are in the table."""
        return len(self._known)

    @property
    def filling(self) -> bool:
        """Whether the folder has not been looked through yet, or has files whose rows are not in the table."""
        return not self.looked or self.indexed < self.files

    @property
    def asked(self) -> int:
        """The number of questions that threads are at work on, or that wait for one."""
        return len(self._asked)

    def fill(self) -> asyncio.Task[None]:
        """Begin to read files that are new or have changed, unless that is under way. Returns the task, which others
        share; `trouble` says why it failed, if it did."""
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill())
        return self._filling

    async def page(self, condition: Where, wanted: Page) -> Rows:
        """Return one page of the samples that a condition is true of. Raises MonitorError."""
        return await self.ask(lambda cursor: _page(cursor, condition, wanted))

    async def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query on the table `samples`. Raises MonitorError."""
        return await self.ask(lambda cursor: cursor.execute(sql, list(values)).fetchall())

    async def places(self, condition: Where, most: int) -> list[Place]:
        """Return where the samples are that a condition is true of, those of the newest steps first."""
        sql = f"SELECT file, row FROM samples WHERE {condition.sql} ORDER BY step DESC, file, row LIMIT {most}"  # noqa: S608
        found = await self.rows(sql, condition.values)
        return [Place(self._numbers[number], row) for number, row in found if number in self._numbers]

    def path_of(self, number: int) -> Path | None:
        """Return the path of a file by its number in the table; None if it is gone."""
        return self._numbers.get(number)

    async def ask(self, work: Callable[[Cursor], T], deadline: float = DEADLINE) -> T:
        """Return what `work` returns, which gets a cursor in a thread. Raises MonitorError if it fails or takes longer.

        If the caller is cancelled, so is the query.
        """
        if self._closed:
            raise MonitorError("the samples of other runs are in memory now; ask again")
        cursor = self._db.cursor()
        with self._lock:
            future = self._asked[cursor] = self._pool.submit(work, cursor)
        future.add_done_callback(lambda _: self._done(cursor))
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise MonitorError(f"the samples were not read within {deadline:g} s; ask for less, or again") from None
        except duckdb.Error as error:
            raise MonitorError(f"the samples could not be read: {_first_line(error)}") from error
        finally:
            with self._lock:
                if cursor in self._asked and not future.done():
                    cursor.interrupt()

    def _done(self, cursor: Cursor) -> None:
        with self._lock:
            del self._asked[cursor]
            cursor.close()

    async def _fill(self) -> None:
        try:
            await self._read_new()
            self.trouble = None
        except MonitorError as error:
            self.trouble = str(error)
        except OSError as error:
            self.trouble = f"{self.folder.name} can't be read: {error.strerror}"

    async def _read_new(self) -> None:
        """Read the newest files first. A file that is gone or was replaced loses its rows."""
        present = await self.ask(lambda _: _present(self.folder))
        self.files, self.looked = len(present), True
        stale = [name for name, known in self._known.items() if present.get(name) != known.signature]
        stale_problems = [name for name in self.problems if name not in present or name in stale]
        for name in stale_problems:
            del self.problems[name]
        if stale:
            await self.ask(lambda cursor: self._forget(cursor, stale), FILL_DEADLINE)
        new = sorted((name for name in present if name not in self._known), key=_step, reverse=True)
        for start in range(0, len(new), FILES_AT_ONCE):
            names = new[start : start + FILES_AT_ONCE]
            try:
                await self.ask(partial(self._add, names=names, present=present), FILL_DEADLINE)
            except MonitorError:
                for name in names:
                    await self._add_one(name, present)

    async def _add_one(self, name: str, present: dict[str, tuple[int, int, int]]) -> None:
        try:
            await self.ask(partial(self._add, names=(name,), present=present, check=True), FILL_DEADLINE)
        except MonitorError as error:
            if (self.folder / name).exists():
                self.problems[name] = str(error).replace(str(self.folder / name), name)
                self._known[name] = Known(-1, present[name])  # not read again until it changes

    def _forget(self, cursor: Cursor, names: Iterable[str]) -> None:
        numbers = [self._known[name].number for name in names]
        cursor.execute("DELETE FROM samples WHERE list_contains(?, file)", [numbers])
        for name in names:
            known = self._known.pop(name)
            self._numbers.pop(known.number, None)

    def _add(
        self, cursor: Cursor, names: Sequence[str], present: dict[str, tuple[int, int, int]], check: bool = False
    ) -> None:
        """Add the rows of files in one transaction. check: the file may lack columns, which are empty then."""
        first = max(self._numbers, default=-1) + 1
        paths = {str(self.folder / name): number for number, name in enumerate(names, start=first)}
        columns, lacking = _readable(cursor, self.folder / names[0]) if check else (NAMES, [])
        for path, number in paths.items():  # before the rows are visible
            self._numbers[number] = Path(path)
        files = f"read_parquet([{', '.join('?' * len(paths))}], file_row_number = true, filename = true)"
        numbered = "map(?, ?)[filename]"
        cursor.execute("BEGIN")
        try:
            cursor.execute(
                f"INSERT INTO samples SELECT {numbered}, file_row_number, {columns} FROM {files}",  # noqa: S608
                [list(paths), list(paths.values()), *paths],
            )
            cursor.execute("COMMIT")
        except BaseException:
            for number in paths.values():
                del self._numbers[number]
            raise  # the cursor is closed, which ends its transaction
        for name, number in zip(names, paths.values(), strict=True):
            self._known[name] = Known(number, present[name])
            if lacking:
                self.problems[name] = f"written by another version of Millrace: it lacks {', '.join(lacking)}"


def _page(cursor: Cursor, condition: Where, wanted: Page) -> Rows:
    total = _one(cursor, "SELECT count(*) FROM samples")
    matched = _one(cursor, f"SELECT count(*) FROM samples WHERE {condition.sql}", condition.values)  # noqa: S608
    names = ", ".join(f'"{name}"' for name in SHOWN)
    # The rows of the page are found first: sorting all columns of a million rows takes several times as long.
    rows = cursor.execute(
        f"SELECT {names} FROM samples WHERE rowid IN (SELECT rowid FROM samples WHERE {condition.sql} "  # noqa: S608
        f"ORDER BY {wanted.order} LIMIT {wanted.limit} OFFSET {wanted.offset}) ORDER BY {wanted.order}",
        list(condition.values),
    ).fetchall()
    return Rows(total, matched, SHOWN, rows)


def _one(cursor: Cursor, sql: str, values: Sequence[object] = ()) -> int:
    row = cursor.execute(sql, list(values)).fetchone()
    return int(row[0]) if row is not None else 0


def _readable(cursor: Cursor, path: Path) -> tuple[str, list[str]]:
    """Return what to select of a file, and the columns that it lacks. Raises MonitorError if it holds no samples."""
    described = cursor.execute("SELECT * FROM read_parquet(?) LIMIT 0", [str(path)]).description
    present = {column[0] for column in described or ()}
    if not {"step", "sample"} <= present:
        raise MonitorError("it holds no samples of this version of Millrace")
    parts = [f'TRY_CAST("{name}" AS {kind})' if name in present else f"NULL::{kind}" for name, kind in COLUMNS.items()]
    return ", ".join(parts), [name for name in COLUMNS if name not in present]


def _present(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return the files of samples with what tells one state of a file from another."""
    found: dict[str, tuple[int, int, int]] = {}
    if not folder.is_dir():
        return found
    for path in folder.iterdir():
        if NAME.fullmatch(path.name):
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            found[path.name] = state.st_ino, state.st_mtime_ns, state.st_size
    return found


def _step(name: str) -> tuple[int, str]:
    match = NAME.fullmatch(name)
    return (int(match[1]) if match else -1), name


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
