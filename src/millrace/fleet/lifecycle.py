"""Engines come and go: new starts, those that join, those that leave."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from millrace.engines.start import Replica
from millrace.errors import EngineError, NoEngineError
from millrace.fleet.owned_replica_set import OwnedReplicaSet
from millrace.fleet.recovery import Recovery
from millrace.fleet.replica_state import CatchingUp, Died, Leaving, Phase, ReplicaState, Slept, WeightsLost
from millrace.fleet.versions import Versions

BUCKET_BYTES = 256 * 2**20
CATCH_UP_DEADLINE = 120.0

logger = logging.getLogger(__name__)


class Lifecycle:
    """`start` starts the engine of that number; None: this fleet starts none. `restarts`: how often in a row an engine
    is started anew by itself. `awake` returns when the fleet's weights do not sleep, since the memory is the trainer's
    meanwhile; `idle`: whether an engine has no requests."""

    def __init__(
        self,
        replica_set: OwnedReplicaSet,
        versions: Versions,
        start: Callable[[int], Awaitable[Replica]] | None,
        restarts: int,
        *,
        awake: Callable[[], Awaitable[None]],
        idle: Callable[[str], bool],
    ) -> None:
        self._replicas, self._versions, self._start = replica_set, versions, start
        self._awake, self._idle = awake, idle
        self._numbers = {name: number for number, name in enumerate(replica_set.replicas)}
        self._renewed: set[str] = set()  # whose end is wanted: they are started anew, or leave
        self._recovery = Recovery(replica_set, restarts if start is not None else 0, self._restart, awake)

    def begin(self) -> None:
        """Watches over the engines from now on."""
        for name in self._replicas.replicas:
            self._replicas.begin_to_watch(name)
        self._recovery.begin()

    async def close(self) -> None:
        """Starts nothing more, and watches no more. The engines are left to their owner."""
        await self._recovery.close()
        await asyncio.gather(*(self._replicas.end_watching(name) for name in self._replicas.replicas))

    def moved(self, member: ReplicaState) -> None:
        """Who is dead or not to be trusted comes back by a new start, unless that end was wanted."""
        if member.phase in (Phase.DEAD, Phase.QUARANTINED) and member.name not in self._renewed:
            self._recovery.lost(member.name)

    async def restart(self, name: str, bucket_bytes: int, deadline: float) -> None:
        """As `Fleet.restart` says."""
        if self._start is None:
            raise NoEngineError(f"{name} was not started by this fleet, which can't start it anew")
        self._require(name)
        await self._recovery.forget(name)
        await self._restart(name, bucket_bytes, deadline)

    async def add(self, bucket_bytes: int, deadline: float) -> str:
        """As `Fleet.add` says."""
        if self._start is None:
            raise NoEngineError("this fleet does not start its engines, and can't start one more")
        await self._awake()
        number = max(self._numbers.values(), default=-1) + 1
        started = await self._start(number)
        self._numbers[started.engine.name] = number
        await self._begin(started, bucket_bytes, deadline)
        return started.engine.name

    async def remove(self, name: str, deadline: float) -> None:
        """As `Fleet.remove` says."""
        replica_set = self._replicas
        self._require(name)
        await self._recovery.forget(name)
        self._renewed.add(name)
        try:
            await replica_set.apply(name, Leaving())
            try:
                async with asyncio.timeout(deadline), replica_set.changed:
                    await replica_set.changed.wait_for(lambda: self._idle(name))
            except TimeoutError:
                logger.warning("%s leaves, and what it still generates is aborted", name)
                with suppress(EngineError):
                    await replica_set.replicas[name].engine.abort()
            await self._end(name, "it has left")
            await replica_set.strike_off(name)
            self._numbers.pop(name)
        finally:
            self._renewed.discard(name)

    async def _restart(self, name: str, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> None:
        assert self._start is not None
        if name in self._renewed:
            raise NoEngineError(f"{name} is being started anew, or leaves")
        self._renewed.add(name)
        try:
            with self._replicas.event_log.restarting(name):
                await self._end(name, "it is being started anew")
                await self._begin(await self._start(self._numbers[name]), bucket_bytes, deadline)
        finally:
            self._renewed.discard(name)

    async def _end(self, name: str, reason: str) -> None:
        await self._replicas.end_watching(name)
        await self._replicas.apply(name, Died(reason))
        await self._replicas.replicas[name].end()
        self._versions.loras.forget(name)

    async def _begin(self, started: Replica, bucket_bytes: int, deadline: float) -> None:
        """Takes a new engine in, and brings it what the others serve."""
        name = started.engine.name
        await self._replicas.take_in(started)
        async with self._versions.changing:
            if self._replicas.snapshot.get(name).phase is Phase.STARTING:  # no publish has come first
                await self._replicas.apply(name, CatchingUp())
                await self._versions.catch_up(started, bucket_bytes, deadline)
            if self._replicas.snapshot.get(name).phase is Phase.CATCHING_UP:  # nobody has what the others serve
                await self._replicas.apply(name, WeightsLost())
            if (asleep := self._replicas.asleep) and self._replicas.snapshot.get(
                name
            ).usable:  # they fell asleep meanwhile
                await self._replicas.apply(name, Slept(asleep))
                await started.engine.sleep(asleep)

    def _require(self, name: str) -> None:
        if not self._replicas.snapshot.has(name):
            raise NoEngineError(f"no engine is called {name}: {self._replicas.snapshot.describe()}")
