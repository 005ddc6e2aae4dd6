"""The state machine of a stock server: which control calls are safe in which state. Pure.

The servers do not check. Releasing memory under a running request, allocating it twice, or loading weights under a
running request crashes them or corrupts their output. So the adapter keeps this state and sends no call that it
forbids. Nothing else may control the server.
"""

from dataclasses import dataclass, replace

from millrace.types import MemoryTag, PauseMode

TORN = "an update ended half-way, so the weights are a mixture of versions; publish a whole version"


class InvalidStateError(Exception):
    """The call would crash or corrupt the server. The message says what to do first."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidStateError(message)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The state of a stock server.

    paused: the mode of the caller's pause. asleep: the released memory. empty: the weights were released and have no
    content. updating: the version of the open update. loaded: whether any of its tensors has reached the server. torn:
    an update ended after that without a commit, so the weights are a mixture of versions.
    """

    paused: PauseMode | None = None
    asleep: frozenset[MemoryTag] = frozenset()
    empty: bool = False
    updating: int | None = None
    loaded: bool = False
    torn: bool = False

    @property
    def admission_closed(self) -> bool:
        """Whether new requests wait in the adapter.

        A paused server would accept a request, but then could not abort it.
        """
        return self.paused is not None or bool(self.asleep) or self.empty or self.updating is not None

    @property
    def generating(self) -> bool:
        """Whether the server itself must be running, not paused."""
        return not self.admission_closed and not self.torn

    def describe(self) -> str:
        """Say why a request has to wait."""
        if self.updating is not None:
            return f"version {self.updating} is being loaded"
        if self.asleep:
            return f"asleep: {', '.join(sorted(self.asleep))}"
        if self.empty:
            return "its weights were released and have no content until the next publish"
        return "ready" if self.paused is None else f"paused ({self.paused})"

    def pausing(self, mode: PauseMode) -> "ServerState":
        return replace(self, paused=mode)

    def resuming(self) -> "ServerState":
        if self.torn:
            raise InvalidStateError(TORN)
        return replace(self, paused=None)

    def sleeping(self, what: frozenset[MemoryTag]) -> "ServerState":
        if self.updating is not None:
            raise InvalidStateError("a weight update is open; commit it or roll it back before the engine sleeps")
        return replace(self, asleep=self.asleep | what, empty=self.empty or MemoryTag.WEIGHTS in what)

    def waking(self, what: frozenset[MemoryTag]) -> "ServerState":
        return replace(self, asleep=self.asleep - what)

    def beginning(self, version: int) -> "ServerState":
        if self.updating is not None:
            raise InvalidStateError(f"the update to version {self.updating} is still open")
        if MemoryTag.WEIGHTS in self.asleep:
            raise InvalidStateError("the weights are asleep; wake them before an update")
        return replace(self, updating=version, loaded=False)

    def adapting(self) -> None:
        """Check that a LoRA adapter can be loaded: its base weights must exist and not be changing."""
        if self.updating is not None or self.torn or self.empty:
            why = TORN if self.torn else self.describe()
            raise InvalidStateError(f"a LoRA adapter can't be loaded now: {why}")

    def loading(self) -> "ServerState":
        """Return the state with old weights that are (partly) overwritten."""
        if self.updating is None:
            raise InvalidStateError("load without begin_update")
        return replace(self, loaded=True)

    def committing(self) -> "ServerState":
        if self.updating is None:
            raise InvalidStateError("commit without begin_update")
        if not self.loaded:
            raise InvalidStateError(f"no tensor of version {self.updating} was loaded")
        return replace(self, updating=None, loaded=False, torn=False, empty=False)

    def rolling_back(self) -> "ServerState":
        return replace(self, updating=None, loaded=False, torn=self.torn or self.loaded)
