"""The engines of a fleet in the process that owns it: what happens to them becomes the snapshot that all read."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from millrace.engines.start import Replica
from millrace.errors import EngineError, LocalError
from millrace.fleet.event_log import EventLog
from millrace.fleet.replica_set import ReplicaSet
from millrace.fleet.replica_state import Answered, CallFailed, Died, Event, Quarantined, ReplicaState, Snapshot, after
from millrace.types import Health

PROCESS_END_DEADLINE = 3.0  # from a closed port to the end of the process, which tells more of the reason

logger = logging.getLogger(__name__)


class OwnedReplicaSet(ReplicaSet):
    """`moved` is called with what a member was and is; it must not wait. `listening` is open as long as an engine's
    process is watched and lives."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        event_log: EventLog,
        moved: Callable[[ReplicaState, ReplicaState], None],
        listening: Callable[[Replica], AbstractAsyncContextManager[None]],
    ) -> None:
        snapshot = Snapshot(0, tuple(ReplicaState(r.engine.name, r.engine.url) for r in replicas))
        super().__init__(snapshot, {replica.engine.name: replica for replica in replicas})
        self.event_log = event_log
        self._moved = moved
        self._listening = listening
        self._watchers: dict[str, asyncio.Task[None]] = {}
        for member in self.snapshot.members:
            event_log.changed(None, member)

    def begin_to_watch(self, name: str) -> None:
        """From now on the end of the engine's process, if that is ours, is known at once."""
        if self.replicas[name].process is not None:
            self._watchers[name] = asyncio.create_task(self._watch(self.replicas[name]))

    async def end_watching(self, name: str) -> None:
        if (watcher := self._watchers.pop(name, None)) is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def take_in(self, started: Replica) -> None:
        """A new engine, or a new life of one."""
        name = started.engine.name
        self.replicas[name] = started
        self.begin_to_watch(name)
        member = ReplicaState(name, started.engine.url)
        self.event_log.changed(None, member)
        await self.show(self.snapshot.with_state(member))

    async def strike_off(self, name: str) -> None:
        """It has left, and is known no more."""
        self.event_log.removed(name)
        await self.show(self.snapshot.without(name))
        self.replicas.pop(name)

    async def apply(self, name: str, event: Event) -> None:
        """What happened to an engine. Who has left is not changed by it."""
        if not self.snapshot.has(name):
            return
        before = self.snapshot.get(name)
        member = after(before, event)
        if member == before:
            return
        self._moved(before, member)
        self.event_log.changed(before, member)
        await self.show(self.snapshot.with_state(member))

    async def each(self, step: Callable[[Replica], Awaitable[None]]) -> None:
        """Takes one step on every usable engine at once. One that fails it is quarantined, with the reason. Raises
        LocalError, after all steps have ended, if this process could not make one of the calls."""
        unasked: list[LocalError] = []

        async def guarded(name: str) -> None:
            try:
                await step(self.replicas[name])
            except LocalError as error:
                unasked.append(error)
            except EngineError as error:
                logger.error("out of rotation: %s", error)
                await self.apply(name, Quarantined(str(error)))

        async with asyncio.TaskGroup() as group:
            for member in self.snapshot.members:
                if member.usable:
                    group.create_task(guarded(member.name))
        if unasked:
            raise unasked[0]
        self.require_hope()

    async def answered(self, name: str) -> None:
        if self.snapshot.has(name) and self.snapshot.get(name).failures:
            await self.apply(name, Answered())

    async def suspect(self, name: str, error: EngineError) -> None:
        """After a failed call: dead if its process or its port says so, otherwise suspect after some of them."""
        replica = self.replicas.get(name)
        if replica is None:  # it has left
            return
        if await replica.engine.health() is not Health.DEAD:
            await self.apply(name, CallFailed(str(error)))
            return
        if (watcher := self._watchers.get(name)) is not None:
            ended, _ = await asyncio.wait([watcher], timeout=PROCESS_END_DEADLINE)
            if ended:
                return  # the watcher has said how it ended
        await self.apply(name, Died(str(error)))

    async def _watch(self, replica: Replica) -> None:
        assert replica.process is not None
        async with self._listening(replica):
            await replica.process.wait()
        reason = replica.process.describe_end()
        logger.error("%s\n%s", reason, replica.process.log_tail())
        await self.apply(replica.engine.name, Died(reason))
