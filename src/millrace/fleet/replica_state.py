"""Who is in the fleet and in which state: a pure state machine, and the snapshots that everybody routes from.

An engine may serve only while it is READY, awake, and holds a committed version that was attested. What is DEAD or
QUARANTINED stays so: only a new start, which is a new member, serves again. One that fails STRIKES calls in a row is
SUSPECT, and serves again when it answers; one that is paused, asleep or busy has not failed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from millrace.errors import EngineError, LocalError
from millrace.types import ALL_MEMORY, MemoryTag

MAX_FAILURES = 3


class Phase(StrEnum):
    STARTING = "starting"
    CATCHING_UP = "catching_up"  # it gets what the others serve
    READY = "ready"
    SUSPECT = "suspect"  # it gets no requests until it answers
    DRAINING = "draining"  # it ends what it has, and leaves the fleet
    QUARANTINED = "quarantined"  # alive, but it may hold other weights than it should
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One engine as the fleet sees it. `version` is what was attested last; None: nothing it may serve. `base`: the
    last whole version that it holds. `lora`: what requests have to name, where the version is one over the base."""

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
        return self.phase is Phase.READY and not self.asleep and self.version is not None

    @property
    def usable(self) -> bool:
        """Whether it serves now or may serve again without a new start."""
        return self.phase in (Phase.STARTING, Phase.CATCHING_UP, Phase.READY, Phase.SUSPECT)

    def describe(self) -> str:
        details = [self.phase.value]
        if self.asleep:
            details.append(f"asleep: {', '.join(sorted(self.asleep))}")
        if self.version is not None:
            over = f", an adapter over version {self.base}" if self.lora is not None else ""
            details.append(f"version {self.version}{over}")
        elif self.phase is Phase.CATCHING_UP:
            details.append("it gets what the others serve")
        elif self.usable:
            details.append("without weights until the next publish")
        if self.reason:
            details.append(self.reason)
        return f"{self.name} ({'; '.join(details)})"


@dataclass(frozen=True, slots=True)
class Attested:
    """The engine holds this version, committed, and its checksums are those of what was sent. It is a whole one, or by
    the name `lora` one over the whole version that the engine has."""

    version: int
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class Based:
    """The engine holds this whole version, and must not serve by it alone: the others have an adapter over it."""

    version: int


@dataclass(frozen=True, slots=True)
class Slept:
    what: frozenset[MemoryTag] = ALL_MEMORY


@dataclass(frozen=True, slots=True)
class Woke:
    what: frozenset[MemoryTag] = ALL_MEMORY


@dataclass(frozen=True, slots=True)
class WeightsLost:
    """The engine is sound, but an update was given up half-way: it has no version before the next publish."""


@dataclass(frozen=True, slots=True)
class CatchingUp:
    """What the others serve is on its way to the engine."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call failed in a way that is the engine's own fault; or so many did."""

    reason: str
    failures: int = 1


@dataclass(frozen=True, slots=True)
class Answered:
    """The engine says that it is ready, or does what it was asked."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """It gets no more requests, and is taken out when it has ended those that it has."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    reason: str


Event = (
    Attested | Based | WeightsLost | Slept | Woke | CatchingUp | CallFailed | Answered | Leaving | Quarantined | Died
)


def after(member: ReplicaState, event: Event) -> ReplicaState:
    """The member after the event. Events about what has ended change nothing: they crossed its end on the way."""
    if not member.usable:
        if not isinstance(event, Died):
            return member
        return replace(without_weights(member), phase=Phase.DEAD, reason=member.reason or event.reason)
    match event:
        case Attested(version, None):
            return replace(answering(member), phase=Phase.READY, version=version, base=version, lora=None)
        case Attested(version, lora):
            if member.base is None:  # what it lay over has gone meanwhile
                return member
            return replace(answering(member), phase=Phase.READY, version=version, lora=lora)
        case Based(version):
            return replace(member, version=None, base=version, lora=None)
        case WeightsLost():
            empty = without_weights(member)
            return replace(empty, phase=Phase.STARTING) if member.phase is Phase.CATCHING_UP else empty
        case Slept(what):
            left = without_weights(member) if MemoryTag.WEIGHTS in what else member
            return replace(left, asleep=member.asleep | what)
        case Woke(what):
            return replace(member, asleep=member.asleep - what)
        case CatchingUp():
            return replace(member, phase=Phase.CATCHING_UP) if member.phase is Phase.STARTING else member
        case CallFailed(reason, count):
            if member.asleep or member.phase is not Phase.READY:  # who does not serve is not asked
                return member
            failures = member.failures + count
            suspect = failures >= MAX_FAILURES
            return replace(
                member,
                failures=failures,
                phase=Phase.SUSPECT if suspect else Phase.READY,
                reason=reason if suspect else None,
            )
        case Answered():
            return answering(member)
        case Leaving():
            return replace(member, phase=Phase.DRAINING)
        case Quarantined(reason):
            return replace(without_weights(member), phase=Phase.QUARANTINED, reason=reason)
        case Died(reason):
            return replace(without_weights(member), phase=Phase.DEAD, reason=reason)


def verdict(error: EngineError) -> Event:
    """What a failed step of an update means for its engine. After a failure of this process the engine is sound, but it
    may lack the version that the others have."""
    return WeightsLost() if isinstance(error, LocalError) else Quarantined(str(error))


def answering(member: ReplicaState) -> ReplicaState:
    """The member, trusted again where it was only suspect; but its next failure makes it suspect again."""
    if member.phase is Phase.SUSPECT:
        return replace(member, phase=Phase.READY, failures=MAX_FAILURES - 1, reason=None)
    return replace(member, failures=0)


def without_weights(member: ReplicaState) -> ReplicaState:
    return replace(member, version=None, base=None, lora=None)


@dataclass(frozen=True)
class Snapshot:
    """The whole fleet at one moment; `number` counts the changes."""

    number: int
    members: tuple[ReplicaState, ...]

    @cached_property
    def routable(self) -> Mapping[str, ReplicaState]:
        """Those that serve now, by name."""
        return {member.name: member for member in self.members if member.routable}

    def with_state(self, member: ReplicaState) -> "Snapshot":
        others = {m.name: m for m in self.members}
        others[member.name] = member
        return Snapshot(self.number + 1, tuple(others.values()))

    def without(self, name: str) -> "Snapshot":
        return Snapshot(self.number + 1, tuple(m for m in self.members if m.name != name))

    def has(self, name: str) -> bool:
        return any(m.name == name for m in self.members)

    def get(self, name: str) -> ReplicaState:
        return next(m for m in self.members if m.name == name)

    @property
    def usable(self) -> bool:
        return any(m.usable for m in self.members)

    def describe(self) -> str:
        return describe(self.members)


def describe(members: Iterable[ReplicaState]) -> str:
    return "; ".join(member.describe() for member in members) or "the fleet has no engines"
