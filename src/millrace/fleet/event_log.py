"""What happens in a fleet, as it happens: events for people and programs, and the totals that metrics are made of.

No event has a prompt, a token or a key in it.
"""

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from millrace.errors import DataError, EngineRefused, EngineTimeout, LocalError, NoEngineError
from millrace.fleet.replica_state import Phase, ReplicaState
from millrace.fleet.routing import Why
from millrace.jsonl import drop_torn_tail
from millrace.types import FinishReason, Generation

if TYPE_CHECKING:
    from millrace.weights.report import PublishReport

REMEMBERED = 200  # events; a page of the newest, and what a slow reader missed
REASON_LIMIT = 500  # characters: a reason may end with lines of a server's log
# Upper bounds in seconds, from one short turn to an episode's deadline; the tail is what slows a step down.
REQUEST_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)

Value = str | int | float | bool | None
logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How one call to one engine ended."""

    FINISHED = "finished"
    ABORTED = "aborted"  # by its caller, or on the engine
    REFUSED = "refused"
    TIMEOUT = "timeout"
    FAILED = "failed"
    LOCAL = "local"  # this process could not make the call
    UNSERVED = "unserved"  # no engine could take it by its deadline


ROUTINE = frozenset({Outcome.FINISHED, Outcome.ABORTED})  # thousands of these would hide all else


def outcome_of(error: BaseException) -> Outcome:
    match error:
        case EngineRefused():
            return Outcome.REFUSED
        case EngineTimeout() | TimeoutError():
            return Outcome.TIMEOUT
        case NoEngineError():
            return Outcome.UNSERVED
        case LocalError():
            return Outcome.LOCAL
        case asyncio.CancelledError():
            return Outcome.ABORTED
    return Outcome.FAILED


def reason_of(error: BaseException) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__)[:REASON_LIMIT]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. `at` is Unix time in seconds."""

    at: float
    kind: str
    engine: str | None
    fields: Mapping[str, Value]


@dataclass(slots=True)
class Spans:
    """How often something was done, and how long that took in all. `below`: how many took no longer than each of
    REQUEST_BOUNDS, and more than the bound before; the last one: longer than all."""

    count: int = 0
    seconds: float = 0.0
    below: list[int] = field(default_factory=lambda: [0] * (len(REQUEST_BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
        self.below[bisect_left(REQUEST_BOUNDS, seconds)] += 1


@dataclass(slots=True)
class Metrics:
    """Since the event log was opened; most by engine."""

    requests: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    request_spans: dict[str, Spans] = field(default_factory=dict)  # of those that finished
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    cached_tokens: Counter[str] = field(default_factory=Counter)  # of the prompts
    output_tokens: Counter[str] = field(default_factory=Counter)
    entered: Counter[tuple[str, Phase]] = field(default_factory=Counter)
    restarts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # and whether it came up
    publishes: Counter[tuple[str, bool]] = field(default_factory=Counter)  # and whether the engine took it
    published_bytes: int = 0  # each version once, to however many engines
    legs: dict[tuple[str, str], Spans] = field(default_factory=dict)
    routed: Counter[Why] = field(default_factory=Counter)  # requests, by what decided
    retries: Counter[bool] = field(default_factory=Counter)  # of samples; whether their tokens were kept
    unwritten: int = 0  # events that did not get into the file
    newest: int | None = None  # weight version

    def cache_hit_share(self, engine: str) -> float | None:
        """Of the prompts' tokens; None where there were none."""
        asked = self.prompt_tokens[engine]
        return self.cached_tokens[engine] / asked if asked else None


@dataclass(slots=True)
class Asked:
    """A request under way. Whoever sends it says what came back."""

    engine: str | None
    made: Generation | None = None


@dataclass(slots=True)
class Publishing:
    """A publish under way. Whoever does it says what came of it."""

    report: "PublishReport | None" = None


class EventLog:
    """Keeps the totals, the newest events and, with `path`, a file with one event a line. Belongs to one event loop;
    whoever made it closes it.

    A file that can't be written any more ends nothing: the log says so once, and the totals go on. Raises DataError
    where it can't be opened.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.metrics = Metrics()
        self.newest: deque[Entry] = deque(maxlen=REMEMBERED)
        self._path = path
        self._torn = False  # the file ends in the middle of a line
        self._file: int | None = None
        if path is not None:
            try:
                drop_torn_tail(path)
                # Reasons quote what servers answered, so nobody else may read it, as with the engines' logs.
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise DataError(f"{path} can't be written: {error.strerror}") from error

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What happens later is counted, and not written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def emit(self, kind: str, engine: str | None = None, **fields: Value) -> None:
        """Writes an event down, and remembers it among the newest."""
        self.newest.append(self._write(kind, engine, fields))

    def changed(self, before: ReplicaState | None, after: ReplicaState) -> None:
        """A member of the fleet is not what it was, or (before None) new."""
        moved = before is None or before.phase is not after.phase
        if moved:
            self.metrics.entered[after.name, after.phase] += 1
        if after.version is not None:
            self._learn(after.version)
        if before is not None and _seen(before) == _seen(after):
            return
        fields: dict[str, Value] = {
            "state": after.phase.value,
            "was": before.phase.value if before is not None and moved else None,
            "version": after.version,
            "asleep": " ".join(sorted(after.asleep)) or None,
            "reason": after.reason[:REASON_LIMIT] if after.reason else None,
        }
        entry = self._write("member", after.name, fields)
        if moved:  # sleep, waking and new versions come with every step
            self.newest.append(entry)

    def removed(self, engine: str) -> None:
        """The engine is no member any more."""
        self.emit("removed", engine)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A request that waits for an engine, and may get none."""
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            self._ended(Asked(None), outcome_of(error), time.monotonic() - started, type(error).__name__)
            raise

    @contextmanager
    def request(self, engine: str) -> Iterator[Asked]:
        """One call to one engine, ended in one way however the block ends."""
        asked, started = Asked(engine), time.monotonic()
        try:
            yield asked
        except BaseException as error:
            self._ended(asked, outcome_of(error), time.monotonic() - started, type(error).__name__)
            raise
        aborted = asked.made is not None and asked.made.finish_reason is FinishReason.ABORT
        self._ended(asked, Outcome.ABORTED if aborted else Outcome.FINISHED, time.monotonic() - started, None)

    @contextmanager
    def publishing(self, version: int, *, lora: bool = False) -> Iterator[Publishing]:
        """A version on its way to the engines."""
        publishing = Publishing()
        what = "adapter" if lora else "weights"
        try:
            yield publishing
        except BaseException as error:
            self.emit("publish_failed", version=version, what=what, reason=reason_of(error))
            raise
        if publishing.report is not None:
            self._published(publishing.report, what)

    @contextmanager
    def restarting(self, engine: str) -> Iterator[None]:
        """A new start of the engine, until it has caught up."""
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            self._restarted(engine, started, reason_of(error))
            raise
        self._restarted(engine, started, None)

    def routed(self, why: Why) -> None:
        """An engine was chosen."""
        self.metrics.routed[why] += 1

    def retried(self, engine: str | None, *, attempt: int, continued: bool) -> None:
        """A sample goes on elsewhere after `engine` failed under it: from the tokens that it has, or anew."""
        self.metrics.retries[continued] += 1
        self.emit("retry", engine, attempt=attempt, continued=continued)

    def _ended(self, asked: Asked, outcome: Outcome, seconds: float, error: str | None) -> None:
        metrics, engine, made = self.metrics, asked.engine or "", asked.made
        metrics.requests[engine, outcome] += 1
        if outcome is Outcome.FINISHED:
            metrics.request_spans.setdefault(engine, Spans()).add(seconds)
        fields: dict[str, Value] = {"outcome": outcome.value, "seconds": round(seconds, 4)}
        if made is not None:
            metrics.prompt_tokens[engine] += made.prompt_tokens
            metrics.cached_tokens[engine] += made.cached_tokens
            metrics.output_tokens[engine] += len(made.output_ids)
            fields |= {
                "prompt_tokens": made.prompt_tokens,
                "cached_tokens": made.cached_tokens,
                "output_tokens": len(made.output_ids),
            }
        if error is not None:
            fields["error"] = error  # its kind alone: its message may quote the request
        entry = self._write("request", asked.engine, fields)
        if outcome not in ROUTINE:
            self.newest.append(entry)

    def _published(self, report: "PublishReport", what: str) -> None:
        metrics = self.metrics
        metrics.published_bytes += report.nbytes
        self._learn(report.version)
        for engine in report.engines:
            sound = engine.error is None
            metrics.publishes[engine.engine, sound] += 1
            legs: dict[str, float] = {
                "begin": engine.begin_seconds,
                "load": engine.load_seconds,
                "attest": engine.attest_seconds,
                "commit": engine.commit_seconds,
                "pause": engine.pause_seconds,
            }
            for leg, seconds in legs.items():
                if sound:  # of one that failed, some legs are missing and others are its deadline
                    metrics.legs.setdefault((engine.engine, leg), Spans()).add(seconds)
            reason = reason_of(engine.error) if engine.error is not None else None
            rounded: dict[str, Value] = {f"{leg}_seconds": round(seconds, 4) for leg, seconds in legs.items()}
            self._write("publish_engine", engine.engine, {"version": report.version, **rounded, "reason": reason})
        self.emit(
            "publish",
            version=report.version,
            what=what,
            nbytes=report.nbytes,
            seconds=round(report.seconds, 4),
            stage_seconds=round(report.stage_seconds, 4),
            engines=len(report.engines) - len(report.failed),
            failed=" ".join(report.failed) or None,
            unstored=report.unstored[:REASON_LIMIT] if report.unstored else None,
        )

    def _restarted(self, engine: str, started: float, reason: str | None) -> None:
        self.metrics.restarts[engine, reason is None] += 1
        kind = "restart" if reason is None else "restart_failed"
        self.emit(kind, engine, seconds=round(time.monotonic() - started, 3), reason=reason)

    def _learn(self, version: int) -> None:
        self.metrics.newest = version if self.metrics.newest is None else max(version, self.metrics.newest)

    def _write(self, kind: str, engine: str | None, fields: Mapping[str, Value]) -> Entry:
        """One system call a line: what is in the file is whole, also after SIGKILL."""
        entry = Entry(round(time.time(), 3), kind, engine, fields)
        if self._file is None:
            return entry
        record = {"at": entry.at, "kind": kind, "engine": engine, **fields}
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if self._torn:
            line = b"\n" + line  # what is left of the line before stands alone
        written, reason = 0, "no room for a whole line"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            reason = error.strerror or str(error)
        if written < len(line):
            if not self.metrics.unwritten:
                logger.error("%s can't be written: %s; the run goes on, and events are missing", self._path, reason)
            self.metrics.unwritten += 1
        self._torn = written < len(line) and (written > 0 or self._torn)
        return entry


def _seen(member: ReplicaState) -> tuple[object, ...]:
    """What people see of a member."""
    return member.phase, member.version, member.lora, member.asleep, member.reason
