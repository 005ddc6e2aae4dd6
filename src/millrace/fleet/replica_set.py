"""The engines of a fleet as a process knows them: the snapshot that it routes from, and how it waits for a change."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress

from millrace.engines.start import Replica
from millrace.errors import EngineError, NoEngineError
from millrace.fleet.replica_state import Snapshot
from millrace.types import MemoryTag


class ReplicaSet(ABC):
    """All of it belongs to one event loop. `changed` is notified with every new snapshot; `coming` names who is on its
    way back; `asleep` is what the fleet was told to release."""

    def __init__(self, snapshot: Snapshot, replicas: Mapping[str, Replica]) -> None:
        self.snapshot = snapshot
        self.replicas = dict(replicas)
        self.changed = asyncio.Condition()
        self.coming: set[str] = set()
        self.asleep: frozenset[MemoryTag] = frozenset()
        self.closed = False  # its block has ended

    @abstractmethod
    async def suspect(self, name: str, error: EngineError) -> None:
        """A call to the engine failed by its own fault."""

    @abstractmethod
    async def answered(self, name: str) -> None:
        """The engine did what it was asked."""

    async def tell(self) -> None:
        """Something has changed that may be waited for."""
        async with self.changed:
            self.changed.notify_all()

    async def show(self, snapshot: Snapshot) -> None:
        """How the engines stand from now on."""
        self.snapshot = snapshot
        await self.tell()

    async def until(self, condition: Callable[[], bool], deadline: float, wanted: str = "") -> None:
        """Waits for something that only an engine can bring about. Raises NoEngineError when there is none left, or the
        deadline passes; `wanted` is said of the engines then."""
        if condition():
            return
        try:
            async with asyncio.timeout(deadline), self.changed:
                while not condition():
                    self.require_hope()
                    await self.changed.wait()
        except TimeoutError:
            raise NoEngineError(
                f"no engine{wanted} could serve within {deadline:.0f} s: {self.snapshot.describe()}"
            ) from None

    async def changed_since(self, number: int, *, deadline: float) -> None:
        """Waits for a snapshot after this one, and no longer than the deadline."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline), self.changed:
                await self.changed.wait_for(lambda: self.snapshot.number > number)

    async def recovered(self) -> None:
        """Waits while no engine is usable and some are being started again, which their own deadlines end."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.snapshot.usable or not self.coming)

    def require_hope(self) -> None:
        """Raises NoEngineError where no engine is left and none is coming back."""
        if not self.snapshot.usable and not self.coming:
            raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")
