"""The runs below a folder, and their records as they grow."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace.errors import ConfigError
from millrace.viewer.following import Follower
from millrace.viewer.timeline import Timeline

MARKS = ("metrics.jsonl", "config.yaml", "events.jsonl")  # a folder with one of these holds a run
DEEPEST = 3  # levels below the folder that is looked through
MOST_RUNS = 500
FRESH_SECONDS = 0.5  # for which what was read is used again
READ_SECONDS = 1.0  # of a file at a time: a very long one appears in parts
BEFORE_TRAINING = {"step", "weight_version", "accuracy"}  # what a run knows before its first step
MOST_ROWS = 5000  # of metrics in one answer
SKETCHED = 1000  # rows of the outline of more
SKETCH_AGAIN = 0.8  # of the rows are in an outline that is not made again
MOST_ADVICE = 500
KNOWN_EVENTS = 60
ROUTINE = ("request", "member", "publish_engine")


def find_runs(root: Path) -> dict[str, Path]:
    """Return the folders of runs at or below a folder, by their names in links.

    Raises ConfigError if there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; give a run's folder, such as runs/NAME, or a folder of runs")
    if _is_run(root):
        return {root.resolve().name: root}
    found = runs_below(root)
    if not found:
        raise ConfigError(f"there is no run at or below {root}: none of its folders has {MARKS[0]}")
    return found


def runs_below(root: Path) -> dict[str, Path]:
    """Return the folders of runs below a folder. Folders that can't be read are passed over."""
    found: dict[str, Path] = {}
    level = [root]
    for _ in range(DEEPEST):
        below: list[Path] = []
        for folder in level:
            for one in _folders(folder):
                if len(found) >= MOST_RUNS:
                    return found
                if _is_run(one):
                    found[one.relative_to(root).as_posix()] = one
                else:
                    below.append(one)
        level = below
    return found


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(one for one in folder.iterdir() if not one.name.startswith(".") and one.is_dir())
    except OSError:
        return []


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


@dataclass(slots=True)
class Columns:
    """Records as columns: names to values, with None where a record lacks the name."""

    count: int = 0
    values: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record. A mapping in it becomes a column for each of its names, as in `rewards.correct`."""
        flat: dict[str, Any] = {}
        if record.get("step") == 0 and record.get("reward", 0) is None:  # nothing was trained, and a 0 is no figure
            record = {name: record[name] for name in record.keys() & BEFORE_TRAINING}
        for name, value in record.items():
            if isinstance(value, dict):
                flat |= {f"{name}.{inner}": part for inner, part in value.items()}
            else:
                flat[name] = value
        for name, value in flat.items():
            if value is None or isinstance(value, int | float):
                if name not in self.values:
                    self.values[name] = [None] * self.count
                self.values[name].append(value)
        self.count += 1
        for column in self.values.values():
            if len(column) < self.count:
                column.append(None)

    def after(self, known: int, most: int) -> dict[str, list[Any]]:
        """Return at most `most` rows after the first `known` ones."""
        return {name: column[known : known + most] for name, column in self.values.items()}

    def sketch(self, most: int) -> dict[str, list[Any]]:
        """Return the outline of all rows in at most `most`: each is the last of as many, with the last values known."""
        every = -(-self.count // most)
        ends = [*range(every - 1, self.count - 1, every), self.count - 1]

        def last(column: Sequence[Any], end: int) -> Any:
            return next((column[row] for row in range(end, max(-1, end - every), -1) if column[row] is not None), None)

        return {name: [last(column, end) for end in ends] for name, column in self.values.items()}


class RunFiles:
    """The records of one run. All methods may be called by any thread; `refresh` reads the files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._lock = threading.Lock()
        self._read_at: dict[Path, float] = {}
        self._troubles: dict[Path, str] = {}
        self._forget_metrics()
        self._metrics = Follower(folder / "metrics.jsonl")
        self._advice = Follower(folder / "advice.jsonl")
        self._forget_events()
        self.advice: list[dict[str, Any]] = []

    def _forget_metrics(self) -> None:
        self.metrics = Columns()

    def _forget_events(self) -> None:
        self._events = Follower(self.folder / "events.jsonl")
        self._of_ranks: dict[Path, Follower] = {}  # events-1.jsonl and so on: what other ranks asked of the engines
        self.timeline = Timeline()
        self.latest: list[dict[str, Any]] = []

    def refresh(self, *, events: bool = False) -> None:
        """Read what has been added to the files, unless that was just done. events: also to events.jsonl."""
        with self._lock:
            self._read(self._metrics, self._take_metrics, self._forget_metrics)
            self._read(self._advice, self._take_advice, self.advice.clear)
            if not events:
                return
            self._read(self._events, self._take_events, self._forget_events)
            for path in sorted(self.folder.glob("events-*.jsonl")):
                follower = self._of_ranks.setdefault(path, Follower(path))
                self._read(follower, self._take_requests, self._forget_events)

    def _read(
        self, follower: Follower, take: Callable[[Sequence[dict[str, Any]]], None], forget: Callable[[], None]
    ) -> None:
        now = time.monotonic()
        if now - self._read_at.get(follower.path, -math.inf) < FRESH_SECONDS:
            return
        self._troubles.pop(follower.path, None)
        try:
            reading = True
            while reading:
                begun, records = follower.read()
                if begun:
                    forget()
                    if forget == self._forget_events:
                        return  # all files of events are read from their beginnings the next time
                take(records)
                reading = follower.more and time.monotonic() - now < READ_SECONDS
        except OSError as error:
            self._troubles[follower.path] = f"{follower.path.name} can't be read: {error.strerror}"
        if not follower.more:
            self._read_at[follower.path] = now

    def _take_metrics(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            if isinstance(record.get("step"), int):
                self.metrics.add(record)

    def _take_advice(self, records: Sequence[dict[str, Any]]) -> None:
        self.advice += [one for one in records if isinstance(one.get("step"), int)]
        del self.advice[:-MOST_ADVICE]

    def _take_events(self, records: Sequence[dict[str, Any]]) -> None:
        self.timeline.add(records)
        for one in records:
            if one.get("kind") not in ROUTINE or one.get("was"):
                self._remember(one)
        del self.latest[:-KNOWN_EVENTS]

    def _remember(self, event: dict[str, Any]) -> None:
        """Keep an event. One that happens many times, such as a retry, is one event with its `times`."""
        last = self.latest[-1] if self.latest else {}
        if {**last, "at": None, "times": None} == {**event, "at": None, "times": None}:
            event = {**event, "times": last.get("times", 1) + 1}
            self.latest.pop()
        self.latest.append(event)

    def _take_requests(self, records: Sequence[dict[str, Any]]) -> None:
        """Take another rank's requests. What it says of the engines' states, rank 0 says too."""
        self.timeline.add(one for one in records if one.get("kind") == "request")

    @property
    def _followers(self) -> list[Follower]:
        return [self._metrics, self._advice, self._events, *self._of_ranks.values()]

    def troubles(self) -> list[str]:
        """Return what is wrong with the files, for people."""
        found = [
            *self._troubles.values(),
            *(f.trouble for f in self._followers if f.trouble),
        ]
        old = [name.name for name in (self.folder / "samples.jsonl",) if name.exists()]
        if old and not (self.folder / "samples").is_dir():
            found.append("the run was written by another version of Millrace: its samples.jsonl can't be shown")
        return found

    def summary(self) -> dict[str, Any]:
        """Return what a list of runs shows."""
        with self._lock:
            values = self.metrics.values
            return {
                "name": self.name,
                "folder": str(self.folder),
                "step": _last(values.get("step", ())),
                "reward": _last(values.get("reward", ())),
                "accuracy": _last(values.get("accuracy", ())),
                "changed_at": self._changed_at(),
                "ended": self._ended(),
                "samples": (self.folder / "samples").is_dir(),
                "advice": len(self.advice),
                "troubles": self.troubles(),
            }

    def _changed_at(self) -> float | None:
        """Return when the run last wrote a step or an event, in Unix time."""
        times = [self._metrics.changed_at]
        with contextlib.suppress(OSError):
            times.append(self._events.path.stat().st_mtime)
        return max(times) or None

    def _ended(self) -> dict[str, Any] | None:
        """Return when the run ended, and the reason if that was an error. None if it did not say so."""
        last = None
        with contextlib.suppress(OSError):
            last = self._events.last()
        return {"at": last.get("at"), "reason": last.get("reason")} if last and last.get("kind") == "closed" else None

    def metrics_after(self, epoch: int, known: int, sketched: int = 0) -> dict[str, Any]:
        """Return the columns after the first `known` rows, or from the first if the epoch is another one.

        There are at most MOST_ROWS in one answer. If many more are missing, the outline of all `total` rows comes first
        (`sketch`). sketched: the rows of which the client has an outline.
        """
        with self._lock:
            metrics, now = self.metrics, self._metrics.epoch
            start = known if epoch == now and 0 <= known <= metrics.count else 0
            sketched = sketched if epoch == now else 0
            answer = {"epoch": now, "start": start, "total": metrics.count, "advice": list(self.advice)}
            if metrics.count - start > MOST_ROWS and sketched < SKETCH_AGAIN * metrics.count:
                return {**answer, "count": start, "columns": {}, "sketch": metrics.sketch(SKETCHED)}
            count = min(start + MOST_ROWS, metrics.count)
            return {**answer, "count": count, "columns": metrics.after(start, MOST_ROWS)}

    def fleet(self) -> dict[str, Any]:
        """Return the engines as the events show them, and the latest events."""
        with self._lock:
            line = self.timeline
            return {"at": line.last, "first": line.first, "newest_version": line.newest,
                    "engines": line.table(), "events": list(self.latest)}  # fmt: skip

    def lanes(self, start: float | None, end: float | None) -> dict[str, Any]:
        """Return the lanes of the timeline between two times; None is its first and its last event."""
        with self._lock:
            line = self.timeline
            first, last = line.first or 0.0, line.last or 0.0
            start, end = first if start is None else start, last if end is None else end
            lanes = line.window(start, end)
            return {"first": first, "last": last, "start": start, "end": end, "lanes": lanes}


def _last(values: Sequence[Any]) -> Any:
    return next((value for value in reversed(values) if value is not None), None)
