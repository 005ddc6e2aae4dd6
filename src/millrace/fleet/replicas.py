"""The replicas of a fleet: this process's view of them, and the set that the process that owns them changes."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Protocol

from millrace.engines.start import Replica
from millrace.errors import EngineError, LocalError, NoEngineError
from millrace.fleet.event_log import EventLog
from millrace.fleet.labels import Labels
from millrace.fleet.replica_state import (
    Answered,
    CallFailed,
    Died,
    Event,
    Phase,
    Quarantined,
    ReplicaState,
    Snapshot,
    after,
)
from millrace.launch.process import Server
from millrace.types import EngineInfo, Health, MemoryTag

DEMAND_COUNTS = 5.0  # seconds for which a follower's report of its waiting requests counts
PROCESS_END_DEADLINE = 3.0  # seconds from a closed port to the end of the process, whose log says more about the reason

logger = logging.getLogger(__name__)


class ReplicaSet(ABC):
    """This process's view of the replicas: the snapshot used for routing, and a condition to wait for changes.

    All of it belongs to one event loop. `by_name`: the replicas by their names. `changed` is notified of every new
    snapshot. `coming`: the names of the replicas that are being started. `elastic`: whether replicas are started when
    requests wait, so that there is hope without any. `asleep`: the memory that the fleet was asked to release.
    `labels`: the labels of the published versions. `closed`: whether the fleet's context has ended.
    """

    def __init__(self, snapshot: Snapshot, replicas: Mapping[str, Replica]) -> None:
        self.snapshot = snapshot
        self.by_name = dict(replicas)
        self.changed = asyncio.Condition()
        self.coming: set[str] = set()
        self.elastic = False
        self._last_info: EngineInfo | None = None  # of a replica that has left
        self.asleep: frozenset[MemoryTag] = frozenset()
        self.labels = Labels()
        self.closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.counts()}>"

    def counts(self) -> str:
        """Return the number of engines in each phase in words, such as `3 engines: 2 ready, 1 dead`."""
        phases = Counter(state.phase.value for state in self.snapshot.replicas)
        number = phases.total()
        counted = ", ".join(f"{count} {phase}" for phase, count in phases.items())
        return f"{number} engine{'' if number == 1 else 's'}{': ' if counted else ''}{counted}"

    @property
    def infos(self) -> Sequence[EngineInfo]:
        """What the replicas report about themselves. While there are none, that of the last one which left.

        Raises NoEngineError if there has been none."""
        if self.by_name:
            return [replica.info for replica in self.by_name.values()]
        if self._last_info is None:
            raise NoEngineError("the fleet has no engine now, and this process has not seen one yet")
        return [self._last_info]

    def forget(self, name: str) -> Replica:
        """Forget and return a replica that has left."""
        replica = self.by_name.pop(name)
        self._last_info = replica.info
        return replica

    @abstractmethod
    async def suspect(self, name: str, error: EngineError) -> None:
        """Record that a call to the engine failed through the engine's own fault."""

    @abstractmethod
    async def answered(self, name: str) -> None:
        """Record that the engine completed a call."""

    async def leaves(self, name: str) -> bool:
        """Return whether the replica leaves the fleet, or has left it."""
        return not self.snapshot.has(name) or self.snapshot.get(name).phase is Phase.DRAINING

    async def notify(self) -> None:
        """Wake the tasks that wait for a change."""
        async with self.changed:
            self.changed.notify_all()

    async def show(self, snapshot: Snapshot) -> None:
        """Replace the snapshot."""
        self.snapshot = snapshot
        await self.notify()

    async def until(self, condition: Callable[[], bool], deadline: float, wanted: str = "") -> None:
        """Wait until the condition holds, which only an engine can bring about.

        Raises NoEngineError when no engine is left or the deadline passes. Its message mentions `wanted`."""
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
        """Wait for a snapshot after this number, or until the deadline passes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline), self.changed:
                await self.changed.wait_for(lambda: self.snapshot.number > number)

    async def recovered(self) -> None:
        """Wait while no engine is usable and some are being started again. The starts have deadlines of their own."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.snapshot.usable or not self.coming)

    async def weights_awake(self) -> None:
        """Wait until the fleet's weights are not asleep."""
        async with self.changed:
            await self.changed.wait_for(lambda: MemoryTag.WEIGHTS not in self.asleep)

    def require_hope(self) -> None:
        """Raises NoEngineError if no engine is left, and none is being started or will be for requests that wait."""
        if not (self.snapshot.usable or self.coming or self.elastic):
            raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")


class FleetObserver(Protocol):
    """The calls with which a replica set asks and informs the rest of its fleet."""

    def replica_changed(self, before: ReplicaState, after: ReplicaState) -> None:
        """Called with every change of state, before the snapshot shows it. Must not wait."""
        ...

    def replica_removed(self, name: str) -> None:
        """Called when a replica has left. Must not wait."""
        ...

    def noticed(self, replica: Replica, seconds: float) -> None:
        """Called when the replica's host is said to go away in so many seconds. Must not wait."""
        ...

    def watching(self, replica: Replica) -> AbstractAsyncContextManager[None]:
        """Return a context that is open while the replica's process is watched."""
        ...

    def is_idle(self, name: str) -> bool:
        """Return whether the replica has no requests of this process."""
        ...


class OwnedReplicaSet(ReplicaSet):
    """The replicas in the process that owns them: events change their states, and with them the snapshot."""

    def __init__(self, replicas: Sequence[Replica], event_log: EventLog, observer: FleetObserver) -> None:
        snapshot = Snapshot(0, tuple(ReplicaState(r.engine.name, r.engine.url) for r in replicas))
        super().__init__(snapshot, {replica.engine.name: replica for replica in replicas})
        self.event_log = event_log
        self.observer = observer
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._demands: dict[str, tuple[int, float]] = {}  # of followers: the requests that wait, and when they said so
        for state in self.snapshot.replicas:
            event_log.changed(None, state)

    def watch(self, name: str) -> None:
        """Watch the engine's process, if this process started it, to learn of its end at once."""
        if self.by_name[name].process is not None:
            self._watchers[name] = asyncio.create_task(self._watch(self.by_name[name]))

    async def unwatch(self, name: str) -> None:
        """Stop watching the engine's process."""
        if (watcher := self._watchers.pop(name, None)) is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def expect(self, name: str, *, coming: bool = True) -> None:
        """Record that a replica is being started, or that this has ended."""
        (self.coming.add if coming else self.coming.discard)(name)
        await self.show(replace(self.snapshot, number=self.snapshot.number + 1))

    def note_demand(self, process: str, waiting: int) -> None:
        """Record how many requests wait in a follower."""
        self._demands[process] = waiting, time.monotonic()

    @property
    def followers_waiting(self) -> int:
        """The requests that wait in followers, as those said that were heard of lately."""
        old = time.monotonic() - DEMAND_COUNTS
        self._demands = {process: told for process, told in self._demands.items() if told[0] and told[1] > old}
        return sum(waiting for waiting, _ in self._demands.values())

    async def add(self, replica: Replica) -> None:
        """Add a new replica, or the new process of one."""
        name = replica.engine.name
        self.by_name[name] = replica
        self.watch(name)
        state = ReplicaState(name, replica.engine.url)
        self.event_log.changed(None, state)
        await self.show(self.snapshot.with_state(state))

    async def remove(self, name: str) -> None:
        """Forget a replica that has left."""
        self.event_log.removed(name)
        self.observer.replica_removed(name)
        await self.show(self.snapshot.without(name))
        self.forget(name)

    async def apply(self, name: str, event: Event) -> None:
        """Apply an event to a replica's state. Does nothing for a replica that has left."""
        if not self.snapshot.has(name):
            return
        before = self.snapshot.get(name)
        state = after(before, event)
        if state == before:
            return
        self.observer.replica_changed(before, state)
        self.event_log.changed(before, state)
        await self.show(self.snapshot.with_state(state))

    async def each(self, step: Callable[[Replica], Awaitable[None]]) -> None:
        """Run one step on every usable replica concurrently. A replica that fails the step is quarantined.

        Raises LocalError, after all steps have ended, if this process could not make one of the calls, and
        NoEngineError if no replica is left."""
        local_errors: list[LocalError] = []

        async def guarded(name: str) -> None:
            try:
                await step(self.by_name[name])
            except LocalError as error:
                local_errors.append(error)
            except EngineError as error:
                logger.error("out of rotation: %s", error)
                await self.apply(name, Quarantined(str(error)))

        async with asyncio.TaskGroup() as group:
            for state in self.snapshot.replicas:
                if state.usable:
                    group.create_task(guarded(state.name))
        if local_errors:
            raise local_errors[0]
        self.require_hope()

    async def answered(self, name: str) -> None:
        if self.snapshot.has(name) and self.snapshot.get(name).failures:
            await self.apply(name, Answered())

    async def suspect(self, name: str, error: EngineError) -> None:
        """Record a failed call. The replica is dead if its process or its port says so, and otherwise suspect after
        several failures in a row."""
        replica = self.by_name.get(name)
        if replica is None:  # it has left
            return
        if await replica.engine.health() is not Health.DEAD:
            await self.apply(name, CallFailed(str(error)))
            return
        if (watcher := self._watchers.get(name)) is not None:
            ended, _ = await asyncio.wait([watcher], timeout=PROCESS_END_DEADLINE)
            if ended:
                return  # the watcher has recorded how it ended
        await self.apply(name, Died(str(error)))

    async def _notice(self, replica: Replica, process: Server) -> None:
        self.observer.noticed(replica, await process.notice())

    async def _watch(self, replica: Replica) -> None:
        assert replica.process is not None
        async with self.observer.watching(replica), asyncio.TaskGroup() as tasks:
            noticing = tasks.create_task(self._notice(replica, replica.process))
            await replica.process.wait()
            noticing.cancel()
        reason = replica.process.describe_end()
        logger.error("%s\n%s", reason, replica.process.log_tail())
        await self.apply(replica.engine.name, Died(reason))
