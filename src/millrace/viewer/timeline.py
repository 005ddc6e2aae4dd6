"""What each engine did when, from the fleet's events. Pure functions of the events."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_BUSY = 20_000  # intervals of an engine; if there are more, those that are near each other become one
NEAREST = 0.05  # seconds between two intervals of generating, below which they are one
LOADING = frozenset({"starting", "catching_up"})
# What a bar shows that stands for many short spans: the first of these that is among them.
FOREMOST = ("dead", "quarantined", "suspect", "draining", "gone", "loading", "asleep", "ready")
LEGS = ("begin", "load", "attest", "commit")


@dataclass(slots=True)
class Span:
    """A time in which an engine was in one state. end: None while it lasts."""

    kind: str
    start: float
    end: float | None = None
    reason: str | None = None


@dataclass(slots=True)
class Lane:
    """The history of one engine, and what is known of it now.

    busy: intervals in which it had requests. publishes: versions that were sent to it, with the seconds of each leg.
    """

    engine: str
    spans: list[Span] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    publishes: list[dict[str, Any]] = field(default_factory=list)
    nearest: float = NEAREST
    version: int | None = None
    asleep: str | None = None
    state: str = "starting"
    reason: str | None = None
    restarts: int = 0
    removed: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    failures: int = 0

    def entered(self, kind: str, at: float, reason: str | None) -> None:
        """Begin a span, unless the engine is in this state already."""
        if self.spans and self.spans[-1].end is None:
            if self.spans[-1].kind == kind:
                return
            self.left(at)
        self.spans.append(Span(kind, at, None, reason))

    def left(self, at: float) -> None:
        """End the last span."""
        if self.spans and self.spans[-1].end is None:
            self.spans[-1].end = max(at, self.spans[-1].start)

    def worked(self, start: float, end: float) -> None:
        """Add an interval with a request."""
        first = last = bisect_left(self.busy, start - self.nearest, key=lambda one: one[1])
        while last < len(self.busy) and self.busy[last][0] <= end + self.nearest:
            start, end = min(start, self.busy[last][0]), max(end, self.busy[last][1])
            last += 1
        self.busy[first:last] = [[start, end]]
        if len(self.busy) > MOST_BUSY:
            self.nearest *= 4
            self.busy = joined(self.busy, self.nearest)


@dataclass(slots=True)
class Timeline:
    """The lanes of all engines of a run."""

    lanes: dict[str, Lane] = field(default_factory=dict)
    first: float | None = None
    last: float | None = None
    newest: int | None = None  # version
    _sending: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Add events, in their order. An event that is not understood is left out."""
        for event in events:
            at, kind = event.get("at"), event.get("kind")
            if isinstance(at, int | float) and isinstance(kind, str):
                try:
                    self._take(float(at), kind, event)
                except (TypeError, ValueError, KeyError):
                    continue
                self.first = at if self.first is None else min(self.first, at)
                self.last = at if self.last is None else max(self.last, at)

    def _take(self, at: float, kind: str, event: Mapping[str, Any]) -> None:
        engine = event.get("engine")
        if kind in ("opened", "closed"):
            self._between(at if kind == "closed" or self.last is None else self.last)
        elif kind == "publish":
            self.newest = max(event["version"], self.newest or 0)
            self._sent(event["version"], at - event["seconds"])
        elif kind == "publish_failed":
            self._sent(event["version"], None)
        elif not isinstance(engine, str):
            return
        elif kind == "publish_engine":
            self._sending.append((engine, event))
        else:
            self._of_engine(self.lanes.setdefault(engine, Lane(engine)), at, kind, event)

    def _between(self, at: float) -> None:
        """A process that had engines has ended, and they with it. A process that was killed did not say so."""
        for lane in self.lanes.values():
            if not lane.removed:
                lane.entered("gone", at, None)
                lane.state, lane.asleep, lane.reason = "gone", None, None

    def _of_engine(self, lane: Lane, at: float, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "request":
            self._request(lane, at, event)
        elif kind == "member":
            state, asleep = event["state"], event.get("asleep")
            shown = "loading" if state in LOADING else "asleep" if state == "ready" and asleep else state
            lane.entered(shown, at, event.get("reason"))
            lane.state, lane.asleep, lane.reason = state, asleep, event.get("reason")
            lane.version, lane.removed = event.get("version"), False
        elif kind == "removed":
            lane.left(at)
            lane.removed = True
        elif kind == "restart":
            lane.restarts += 1

    def _request(self, lane: Lane, at: float, event: Mapping[str, Any]) -> None:
        lane.requests += 1
        lane.failures += event["outcome"] not in ("finished", "aborted")
        lane.prompt_tokens += event.get("prompt_tokens", 0)
        lane.cached_tokens += event.get("cached_tokens", 0)
        lane.output_tokens += event.get("output_tokens", 0)
        lane.worked(at - event["seconds"], at)

    def _sent(self, version: int, start: float | None) -> None:
        """Add the legs of a publish to the lanes, when its end is known."""
        for engine, event in self._sending:
            legs = {leg: event.get(f"{leg}_seconds") or 0.0 for leg in LEGS}
            begun = event["at"] - sum(legs.values()) if start is None else start
            lane = self.lanes.setdefault(engine, Lane(engine))
            pause, reason = event.get("pause_seconds") or 0.0, event.get("reason")
            lane.publishes.append({"version": version, "start": begun, "legs": legs, "pause": pause, "reason": reason})
        self._sending.clear()

    def window(self, start: float, end: float, bars: int = 1500) -> list[dict[str, Any]]:
        """Return the lanes between two times. Spans narrower than a `bars`th of them are drawn together."""
        finest = (end - start) / bars
        last = self.last if self.last is not None else end
        return [
            {
                "engine": name,
                "spans": coarser([s for s in lane.spans if s.start <= end and (s.end or last) >= start], finest, last),
                "busy": joined([b for b in lane.busy if b[0] <= end and b[1] >= start], finest),
                "publishes": thinned([p for p in lane.publishes if start - 600 <= p["start"] <= end], bars),
            }
            for name, lane in sorted(self.lanes.items(), key=lambda one: _natural(one[0]))
        ]

    def table(self) -> list[dict[str, Any]]:
        """Return what the events say of each engine at their end, as rows."""
        return [
            {
                "name": lane.engine, "state": "left" if lane.removed else lane.state, "version": lane.version,
                "lag": None if self.newest is None or lane.version is None else max(0, self.newest - lane.version),
                "asleep": lane.asleep.split() if lane.asleep else [], "reason": lane.reason,
                "restarts": lane.restarts, "requests": lane.requests, "failures": lane.failures,
                "output_tokens": lane.output_tokens,
                "cache_hit_share": lane.cached_tokens / lane.prompt_tokens if lane.prompt_tokens else None,
            }
            for _, lane in sorted(self.lanes.items(), key=lambda one: _natural(one[0]))
        ]  # fmt: skip


def _natural(name: str) -> tuple[str, int]:
    """Return a key that sorts sglang-10 after sglang-9."""
    base, _, number = name.rpartition("-")
    return (base, int(number)) if number.isdecimal() and len(number) < 10 else (name, 0)


def joined(intervals: Iterable[list[float]], nearest: float) -> list[list[float]]:
    """Return intervals of which none is nearer to the next than `nearest`."""
    made: list[list[float]] = []
    for start, end in intervals:
        if made and start <= made[-1][1] + nearest:
            made[-1][1] = max(made[-1][1], end)
        else:
            made.append([start, end])
    return made


def coarser(spans: Iterable[Span], finest: float, last: float) -> list[list[Any]]:
    """Return spans as [kind, start, end, reason]. Neighbours that are shorter than `finest` become one."""
    made: list[list[Any]] = []
    short: list[list[Any]] = []

    def flush() -> None:
        if short:
            worst = min(short, key=lambda one: FOREMOST.index(one[0]) if one[0] in FOREMOST else 0)
            made.append([worst[0], short[0][1], short[-1][2], worst[3]])
            short.clear()

    for span in spans:
        end = span.end if span.end is not None else max(last, span.start)
        bar = [span.kind, span.start, end, span.reason]
        if short and span.start - short[-1][2] >= finest:  # the engine was not in the fleet between the two
            flush()
        if end - span.start >= finest:
            flush()
            made.append(bar)
        else:
            short.append(bar)
            if end - short[0][1] >= finest:
                flush()
    flush()
    return made


def thinned(items: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` items, evenly chosen; those with a reason stay."""
    if len(items) <= most:
        return items
    every = -(-len(items) // most)
    return [item for index, item in enumerate(items) if index % every == 0 or item["reason"]]
