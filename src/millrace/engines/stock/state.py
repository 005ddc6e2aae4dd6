"""What a stock server may be asked in which state: a pure state machine.

The servers themselves do not ask: memory released under a running request, taken back twice, or weights loaded under
one kill them or corrupt what they generate. The adapter keeps this state, sends nothing that it forbids, and is the
only one that controls the server.
"""

from dataclasses import dataclass, replace

from millrace.types import MemoryTag, PauseMode

TORN = "an update was given up half-way and the weights are of no version; publish a whole version"


class InvalidStateError(Exception):
    """The call would crash or corrupt the server in this state. The message says what to do first."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidStateError(message)


@dataclass(frozen=True, slots=True)
class ServerState:
    """paused: by the caller. asleep: what is released. empty: the weights were released and have no content yet.
    updating: the version that is on its way. loaded: whether any of it has reached the server. torn: an update was
    given up after that, so the weights are of no version."""

    paused: PauseMode | None = None
    asleep: frozenset[MemoryTag] = frozenset()
    empty: bool = False
    updating: int | None = None
    loaded: bool = False
    torn: bool = False

    @property
    def held(self) -> bool:
        """Whether the adapter keeps new requests back: the server must not see one. While it is paused it would take
        them, but could not be told to forget one."""
        return self.paused is not None or bool(self.asleep) or self.empty or self.updating is not None

    @property
    def generating(self) -> bool:
        """Whether the server itself must go on, as opposed to paused."""
        return not self.held and not self.torn

    def describe(self) -> str:
        """In words, why a request has to wait."""
        if self.updating is not None:
            return f"version {self.updating} is being loaded"
        if self.asleep:
            return f"asleep: {', '.join(sorted(self.asleep))}"
        if self.empty:
            return "its weights were released, and have no content before the next publish"
        return "ready" if self.paused is None else f"paused ({self.paused})"

    def pausing(self, mode: PauseMode) -> "ServerState":
        return replace(self, paused=mode)

    def resuming(self) -> "ServerState":
        if self.torn:
            raise InvalidStateError(TORN)
        return replace(self, paused=None)

    def sleeping(self, what: frozenset[MemoryTag]) -> "ServerState":
        if self.updating is not None:
            raise InvalidStateError("a weight update is under way; commit it or roll it back before the engine sleeps")
        return replace(self, asleep=self.asleep | what, empty=self.empty or MemoryTag.WEIGHTS in what)

    def waking(self, what: frozenset[MemoryTag]) -> "ServerState":
        return replace(self, asleep=self.asleep - what)

    def beginning(self, version: int) -> "ServerState":
        if self.updating is not None:
            raise InvalidStateError(f"the update to version {self.updating} is still under way")
        if MemoryTag.WEIGHTS in self.asleep:
            raise InvalidStateError("the weights are asleep; wake them before an update")
        return replace(self, updating=version, loaded=False)

    def adapting(self) -> None:
        """An adapter belongs to weights that are there, and stay."""
        if self.updating is not None or self.torn or self.empty:
            why = TORN if self.torn else self.describe()
            raise InvalidStateError(f"an adapter needs weights that it can be laid over: {why}")

    def loading(self) -> "ServerState":
        """From here on the old weights are gone."""
        if self.updating is None:
            raise InvalidStateError("load without begin_update")
        return replace(self, loaded=True)

    def committing(self) -> "ServerState":
        if self.updating is None:
            raise InvalidStateError("commit without begin_update")
        if not self.loaded:
            raise InvalidStateError(f"nothing was loaded of version {self.updating}")
        return replace(self, updating=None, loaded=False, torn=False, empty=False)

    def rolling_back(self) -> "ServerState":
        return replace(self, updating=None, loaded=False, torn=self.torn or self.loaded)
