"""The states of a fleet's engines: a pure state machine, and the snapshots used for routing.

An engine may serve only while it is READY, awake, and holds a committed version that was attested. A DEAD or
QUARANTINED engine stays so: it serves again only after a restart, which begins with a new state. An engine that fails
MAX_FAILURES calls in a row is SUSPECT, and serves again when it answers. An engine that is paused, asleep or busy has
not failed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from millrace.errors import EngineError, LocalError
from millrace.types import ALL_MEMORY, MemoryTag

MAX_FAILURES = 3


class Phase(StrEnum):
    """The phases in the life of an engine."""

    STARTING = "starting"
    CATCHING_UP = "catching_up"  # it receives the weights that the others serve
    READY = "ready"
    SUSPECT = "suspect"  # it gets no requests until it answers
    DRAINING = "draining"  # it completes its requests, and leaves the fleet
    QUARANTINED = "quarantined"  # alive, but it may hold the wrong weights
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """The state of one engine, as the fleet knows it.

    `version`: the version that was attested last; None if the engine has no version to serve. `base`: the last whole
    version that the engine holds. `lora`: the adapter that requests must name, if `version` is an adapter over `base`.
    """

    name: str
    url: str
    phase: Phase = Phase.STARTING
    version: int | None = None
    base: int | None = None
    lora: str | None = None
    asleep: frozenset[MemoryTag] = frozenset()
    reason: str | None = None  # why it is suspect, quarantined or dead
    failures: int = 0  # calls that failed since it answered last

    @property
    def routable(self) -> bool:
        """Whether the engine may get requests now."""
        return self.phase is Phase.READY and not self.asleep and self.version is not None

    @property
    def usable(self) -> bool:
        """Whether the engine serves now or may serve again without a restart."""
        return self.phase in (Phase.STARTING, Phase.CATCHING_UP, Phase.READY, Phase.SUSPECT)

    def describe(self) -> str:
        """Return the name and the state in words, for messages."""
        details = [self.phase.value]
        if self.asleep:
            details.append(f"asleep: {', '.join(sorted(self.asleep))}")
        if self.version is not None:
            over = f", an adapter over version {self.base}" if self.lora is not None else ""
            details.append(f"version {self.version}{over}")
        elif self.phase is Phase.CATCHING_UP:
            details.append("receiving the weights that the others serve")
        elif self.usable:
            details.append("without weights; publish a version")
        if self.reason:
            details.append(self.reason)
        return f"{self.name} ({'; '.join(details)})"


@dataclass(frozen=True, slots=True)
class Attested:
    """The engine holds this version, committed, and its checksums are those of the tensors that were sent.

    With `lora`, the version is the adapter of that name over the whole version that the engine holds.
    """

    version: int
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class Based:
    """The engine holds this whole version, but must not serve it alone: the others have an adapter over it."""

    version: int


@dataclass(frozen=True, slots=True)
class Slept:
    """The engine released this memory."""

    what: frozenset[MemoryTag] = ALL_MEMORY


@dataclass(frozen=True, slots=True)
class Woke:
    """The engine got this memory back."""

    what: frozenset[MemoryTag] = ALL_MEMORY


@dataclass(frozen=True, slots=True)
class WeightsLost:
    """The engine is healthy, but an update was aborted half-way: it has no version until the next publish."""


@dataclass(frozen=True, slots=True)
class CatchingUp:
    """The engine is receiving the weights that the others serve."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """One or more calls failed through the engine's own fault."""

    reason: str
    failures: int = 1


@dataclass(frozen=True, slots=True)
class Answered:
    """The engine reported that it is ready, or completed a call."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """The engine gets no more requests, and leaves the fleet when it has completed its last one."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The engine may hold the wrong weights."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The engine's process or server has ended."""

    reason: str


Event = (
    Attested | Based | WeightsLost | Slept | Woke | CatchingUp | CallFailed | Answered | Leaving | Quarantined | Died
)


def after(state: ReplicaState, event: Event) -> ReplicaState:
    """Return the state after the event. Late events about an engine that has ended change nothing."""
    if not state.usable:
        if not isinstance(event, Died):
            return state
        return replace(without_weights(state), phase=Phase.DEAD, reason=state.reason or event.reason)
    match event:
        case Attested(version, None):
            return replace(answering(state), phase=Phase.READY, version=version, base=version, lora=None)
        case Attested(version, lora):
            if state.base is None:  # its base version has gone meanwhile
                return state
            return replace(answering(state), phase=Phase.READY, version=version, lora=lora)
        case Based(version):
            return replace(state, version=None, base=version, lora=None)
        case WeightsLost():
            empty = without_weights(state)
            return replace(empty, phase=Phase.STARTING) if state.phase is Phase.CATCHING_UP else empty
        case Slept(what):
            left = without_weights(state) if MemoryTag.WEIGHTS in what else state
            return replace(left, asleep=state.asleep | what)
        case Woke(what):
            return replace(state, asleep=state.asleep - what)
        case CatchingUp():
            return replace(state, phase=Phase.CATCHING_UP) if state.phase is Phase.STARTING else state
        case CallFailed(reason, count):
            if state.asleep or state.phase is not Phase.READY:  # an engine that does not serve cannot fail
                return state
            failures = state.failures + count
            suspect = failures >= MAX_FAILURES
            return replace(
                state,
                failures=failures,
                phase=Phase.SUSPECT if suspect else Phase.READY,
                reason=reason if suspect else None,
            )
        case Answered():
            return answering(state)
        case Leaving():
            return replace(state, phase=Phase.DRAINING)
        case Quarantined(reason):
            return replace(without_weights(state), phase=Phase.QUARANTINED, reason=reason)
        case Died(reason):
            return replace(without_weights(state), phase=Phase.DEAD, reason=reason)


def verdict(error: EngineError) -> Event:
    """Return the event for an engine whose update failed.

    After a failure of this process the engine is healthy, but may lack the version that the others have.
    """
    return WeightsLost() if isinstance(error, LocalError) else Quarantined(str(error))


def answering(state: ReplicaState) -> ReplicaState:
    """Return the state after a call that succeeded. One more failure makes a suspect engine suspect again."""
    if state.phase is Phase.SUSPECT:
        return replace(state, phase=Phase.READY, failures=MAX_FAILURES - 1, reason=None)
    return replace(state, failures=0)


def without_weights(state: ReplicaState) -> ReplicaState:
    """Return the state of an engine that holds no weights."""
    return replace(state, version=None, base=None, lora=None)


@dataclass(frozen=True)
class Snapshot:
    """The states of all engines at one moment. `number` counts the changes."""

    number: int
    replicas: tuple[ReplicaState, ...]

    @cached_property
    def routable(self) -> Mapping[str, ReplicaState]:
        """The engines that may get requests now, by name."""
        return {state.name: state for state in self.replicas if state.routable}

    def with_state(self, state: ReplicaState) -> "Snapshot":
        """Return the next snapshot, with this state added or replaced."""
        states = {known.name: known for known in self.replicas}
        states[state.name] = state
        return Snapshot(self.number + 1, tuple(states.values()))

    def without(self, name: str) -> "Snapshot":
        """Return the next snapshot, without this engine."""
        return Snapshot(self.number + 1, tuple(state for state in self.replicas if state.name != name))

    def has(self, name: str) -> bool:
        return any(state.name == name for state in self.replicas)

    def get(self, name: str) -> ReplicaState:
        return next(state for state in self.replicas if state.name == name)

    @property
    def usable(self) -> bool:
        """Whether any engine serves now or may serve again without a restart."""
        return any(state.usable for state in self.replicas)

    def describe(self) -> str:
        """Return the states of all engines in words, for messages."""
        return "; ".join(state.describe() for state in self.replicas) or "the fleet has no engines"
