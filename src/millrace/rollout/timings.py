"""Where the time of a sample, or of a step, goes: the seconds of named parts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Timings:
    """When a sample ran, and where its time went.

    started_at: Unix time in seconds. seconds: from its start to its end. parts: seconds by name. `queue`: its requests
    waited for room on an engine. `generate`: engines answered them. `tools`: tools answered; of an agent, all else that
    it did. `environment`: an environment answered. `reward`: reward functions and a judge ran. `paused`: the engines
    slept or were started again. `agent_queue`: it waited until fewer agents ran. Requests that an agent sends at the
    same time add up.
    """

    started_at: float = 0.0
    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def with_part(self, name: str, seconds: float) -> "Timings":
        """Return the timings of a sample that went on for so many seconds more."""
        parts = {**self.parts, name: self.parts.get(name, 0.0) + seconds}
        return replace(self, seconds=self.seconds + seconds, parts=parts)


@dataclass(slots=True)
class Stopwatch:
    """Measures the seconds of named blocks and adds them up by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    _unix: float = field(default_factory=time.time, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.count(name, time.monotonic() - started)

    def count(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def add(self, other: "Stopwatch") -> None:
        """Add the seconds of another stopwatch."""
        for name, seconds in other.seconds.items():
            self.count(name, seconds)

    def timings(self) -> Timings:
        """Return the timings of a sample that started with this stopwatch and ends now."""
        return Timings(self._unix, time.monotonic() - self._started, dict(self.seconds))
