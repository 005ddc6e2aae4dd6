"""The event log of a fleet: events for people and programs, and the totals behind its metrics.

No event contains a prompt, a token or a key.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.errors import EngineRefused, EngineTimeout, LocalError, MillraceError, NoEngineError
from millrace.fleet.event_file import EventFile, Value
from millrace.fleet.labels import Label
from millrace.fleet.replica_state import Phase, ReplicaState
from millrace.fleet.routing import Why
from millrace.tracing import Attributes, span, trace
from millrace.types import FinishReason, Generation

if TYPE_CHECKING:
    from millrace.weights.report import PublishReport

REMEMBERED = 200  # newest events, for pages that show them and readers that missed some
REASON_LIMIT = 500  # characters; a reason may end with lines of a server's log
# Upper bounds in seconds, from one short turn to the deadline of an episode. The slowest requests delay a step most.
REQUEST_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)


class Outcome(StrEnum):
    """How one call to one engine ended."""

    FINISHED = "finished"
    ABORTED = "aborted"  # by its caller, or on the engine
    REFUSED = "refused"
    TIMEOUT = "timeout"
    FAILED = "failed"
    LOCAL = "local"  # this process could not make the call
    UNSERVED = "unserved"  # no engine could take it by its deadline


ROUTINE = frozenset({Outcome.FINISHED, Outcome.ABORTED})  # thousands of these would hide all others


def outcome_of(error: BaseException) -> Outcome:
    """Return the outcome of a call that raised this error."""
    match error:
        case EngineRefused():
            return Outcome.REFUSED
        case EngineTimeout() | TimeoutError():
            return Outcome.TIMEOUT
        case NoEngineError():
            return Outcome.UNSERVED
        case LocalError():
            return Outcome.LOCAL
        case asyncio.CancelledError() | GeneratorExit():  # its task was cancelled, or its stream closed
            return Outcome.ABORTED
    return Outcome.FAILED


def reason_of(error: BaseException) -> str:
    """Return the first line of the error's message, cut to REASON_LIMIT characters."""
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
    """A histogram of durations.

    `count`: the number of durations. `seconds`: their sum. `below`: the number of durations in each bucket; bucket `i`
    ends at REQUEST_BOUNDS[i], inclusive, and the last one has no upper bound.
    """

    count: int = 0
    seconds: float = 0.0
    below: list[int] = field(default_factory=lambda: [0] * (len(REQUEST_BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.count += 1
        self.seconds += seconds
        self.below[bisect_left(REQUEST_BOUNDS, seconds)] += 1


@dataclass(slots=True)
class Metrics:
    """The totals since the event log was opened, most of them by engine."""

    requests: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    request_spans: dict[str, Spans] = field(default_factory=dict)  # of those that finished
    waits: Spans = field(default_factory=Spans)  # of requests for room on an engine
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    cached_tokens: Counter[str] = field(default_factory=Counter)  # of the prompts
    output_tokens: Counter[str] = field(default_factory=Counter)
    entered: Counter[tuple[str, Phase]] = field(default_factory=Counter)
    restarts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # with whether the engine came up
    publishes: Counter[tuple[str, bool]] = field(default_factory=Counter)  # with whether the engine took the version
    published_bytes: int = 0  # each version counts once, for any number of engines
    legs: dict[tuple[str, str], Spans] = field(default_factory=dict)  # steps of a publish
    routed: Counter[Why] = field(default_factory=Counter)  # requests, by the reason for the choice of their engine
    scalings: Counter[tuple[str, bool]] = field(default_factory=Counter)  # up or down, with whether it succeeded
    retries: Counter[bool] = field(
        default_factory=Counter
    )  # of requests and samples, by whether their tokens were kept
    unwritten: int = 0  # events that could not be written to the file
    newest: int | None = None  # weight version

    def cache_hit_share(self, engine: str) -> float | None:
        """Return the cached share of the prompts' tokens, from 0 to 1; None before the first request."""
        tokens = self.prompt_tokens[engine]
        return self.cached_tokens[engine] / tokens if tokens else None


@dataclass(slots=True)
class Asked:
    """A call under way. The caller sets `made` to its result."""

    engine: str | None
    made: Generation | None = None


@dataclass(slots=True)
class Publishing:
    """A publish under way. The caller sets `report` to its result."""

    report: "PublishReport | None" = None


class EventLog:
    """The totals, the newest events and, with `path`, a JSON Lines file with one event a line.

    An event log belongs to one event loop. The code that opens it also closes it, and the file says when:

        with EventLog(Path("events.jsonl")) as event_log:
            async with open_fleet(config, model_path, log_dir="logs", event_log=event_log) as fleet:
                ...

    If writing to the file fails later, a message is logged once, and the totals are still counted.

    Raises DataError if the file can't be opened.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.metrics = Metrics()
        self.newest: deque[Entry] = deque(maxlen=REMEMBERED)
        self._file = None if path is None else EventFile(path)
        self._starting: set[str] = set()  # engines whose start was recorded, and that are not in the fleet yet

    def __enter__(self) -> "EventLog":
        if self._file is not None:
            self._write("opened", None, {})
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._file is not None:
            self._write("closed", None, {"reason": None if error is None else _end(error)})
        self.close()

    def close(self) -> None:
        """Close the file. Later events are counted, but not written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def emit(self, kind: str, engine: str | None = None, **fields: Value) -> None:
        """Record an event: write it to the file, and keep it among the newest."""
        self.newest.append(self._write(kind, engine, fields))

    @contextmanager
    def starting(self, engine: str) -> Iterator[None]:
        """Return a context for the start of an engine, which is recorded as it begins. If it fails, the engine is
        recorded as dead. A fleet learns of the engine afterwards."""
        state = ReplicaState(engine, "")
        self._starting.discard(engine)
        self.changed(None, state)
        self._starting.add(engine)
        try:
            yield
        except Exception as error:
            self._starting.discard(engine)
            self._member(replace(state, phase=Phase.DEAD, reason=reason_of(error)), state.phase)
            raise

    def changed(self, before: ReplicaState | None, after: ReplicaState) -> None:
        """Record that the state of an engine has changed, or that the engine is new (`before` is None)."""
        if before is None and after.name in self._starting:
            self._starting.discard(after.name)
            return
        moved = before is None or before.phase is not after.phase
        if moved:
            self.metrics.entered[after.name, after.phase] += 1
        if after.version is not None:
            self._learn(after.version)
        if before is not None and _visible(before) == _visible(after):
            return
        entry = self._member(after, before.phase if before is not None and moved else None)
        if moved:  # sleep, waking and new versions are part of every training step
            self.newest.append(entry)

    def _member(self, state: ReplicaState, was: Phase | None) -> Entry:
        fields: dict[str, Value] = {
            "state": state.phase.value,
            "was": None if was is None else was.value,
            "version": state.version,
            "asleep": " ".join(sorted(state.asleep)) or None,
            "reason": state.reason[:REASON_LIMIT] if state.reason else None,
        }
        return self._write("member", state.name, fields)

    def removed(self, engine: str) -> None:
        """Record that the engine has left the fleet."""
        self.emit("removed", engine)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context for the wait for an engine. An error that ends it is recorded as a request's."""
        started = time.monotonic()
        try:
            with span("queue"):
                yield
        except BaseException as error:
            self._ended(Asked(None), outcome_of(error), time.monotonic() - started, type(error).__name__)
            raise

    @contextmanager
    def request(self, engine: str) -> Iterator[Asked]:
        """Return a context for one call to one engine, and record its outcome."""
        asked, started = Asked(engine), time.monotonic()
        try:
            with span("generate", {"millrace.engine": engine}) as traced:
                yield asked
                if asked.made is not None:
                    traced.set(_traced(asked.made))
        except BaseException as error:
            self._ended(asked, outcome_of(error), time.monotonic() - started, type(error).__name__)
            raise
        aborted = asked.made is not None and asked.made.finish_reason is FinishReason.ABORT
        self._ended(asked, Outcome.ABORTED if aborted else Outcome.FINISHED, time.monotonic() - started, None)

    @contextmanager
    def publishing(self, version: int, label: Label | None = None, *, lora: bool = False) -> Iterator[Publishing]:
        """Return a context for the publish of one version, and record its outcome."""
        publishing = Publishing()
        what = "adapter" if lora else "weights"
        try:
            with trace("publish", {"millrace.weight_version": version, "millrace.what": what}) as traced:
                yield publishing
                if (report := publishing.report) is not None:
                    traced.set({"millrace.bytes": report.nbytes, "millrace.failed_engines": list(report.failed)})
        except BaseException as error:
            self.emit("publish_failed", version=version, label=label, what=what, reason=reason_of(error))
            raise
        if publishing.report is not None:
            self._published(publishing.report, what)

    @contextmanager
    def restarting(self, engine: str) -> Iterator[None]:
        """Return a context for the restart of an engine, until it holds the current weights. Records its outcome."""
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            self._restarted(engine, started, reason_of(error))
            raise
        self._restarted(engine, started, None)

    def scaled(self, direction: str, engine: str | None, seconds: float, reason: str | None) -> None:
        """Record that the fleet has grown (`up`) or shrunk (`down`) by an engine, or the reason why it could not."""
        self.metrics.scalings[direction, reason is None] += 1
        kind = f"scale_{direction}" if reason is None else f"scale_{direction}_failed"
        self.emit(kind, engine, seconds=round(seconds, 3), reason=reason)

    def routed(self, why: Why) -> None:
        """Record the reason for which an engine was chosen."""
        self.metrics.routed[why] += 1

    def waited(self, seconds: float) -> None:
        """Record how long a request waited for room on an engine."""
        self.metrics.waits.add(seconds)

    def retried(self, engine: str | None, *, attempt: int, continued: bool) -> None:
        """Record that a request or a sample is tried again after `engine` failed. `continued`: its tokens were kept."""
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
            fields["error"] = error  # the type alone: the message may quote the request
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
                if sound:  # a failed engine lacks some steps, and others took until the deadline
                    metrics.legs.setdefault((engine.engine, leg), Spans()).add(seconds)
            reason = reason_of(engine.error) if engine.error is not None else None
            rounded: dict[str, Value] = {f"{leg}_seconds": round(seconds, 4) for leg, seconds in legs.items()}
            self._write("publish_engine", engine.engine, {"version": report.version, **rounded, "reason": reason})
        self.emit(
            "publish",
            version=report.version,
            label=report.label,
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
        """Write an event to the file, if there is one."""
        entry = Entry(round(time.time(), 3), kind, engine, fields)
        if self._file is not None and not self._file.write({"at": entry.at, "kind": kind, "engine": engine, **fields}):
            self.metrics.unwritten += 1
        return entry


def _end(error: BaseException) -> str:
    """Return why a process ended, in words. The message of an error that is not Millrace's may quote a prompt."""
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return "interrupted"
    return reason_of(error) if isinstance(error, MillraceError) else type(error).__name__


def _traced(made: Generation) -> Attributes:
    """Return what a trace says of a generation, by OpenTelemetry's names where it has some."""
    return {
        "gen_ai.usage.input_tokens": made.prompt_tokens,
        "gen_ai.usage.output_tokens": len(made.output_ids),
        "gen_ai.response.finish_reasons": [made.finish_reason.value],
        "millrace.cached_tokens": made.cached_tokens,
        "millrace.request": made.request_id,
        "millrace.weight_versions": list(dict.fromkeys(s.version for s in made.version_spans if s.version is not None)),
    }


def _visible(state: ReplicaState) -> tuple[object, ...]:
    """Return the parts of a state whose changes are recorded."""
    return state.phase, state.version, state.lora, state.asleep, state.reason
