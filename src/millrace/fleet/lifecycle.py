"""The lifecycle of a fleet's engines: starting, restarting, adding and removing them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from millrace.engines.start import Replica
from millrace.errors import EngineError, NoEngineError
from millrace.fleet.replica_state import CatchingUp, Died, Leaving, Phase, ReplicaState, Slept, WeightsLost
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.fleet.supervisor import Supervisor
from millrace.fleet.versions import Versions

BUCKET_BYTES = 256 * 2**20
CATCH_UP_DEADLINE = 120.0

logger = logging.getLogger(__name__)


class Lifecycle:
    """Starts and ends the engines of a fleet. `start` starts the engine of that number; None if this fleet starts none.
    `restarts`: how often in a row an engine is restarted automatically."""

    def __init__(
        self,
        replicas: OwnedReplicaSet,
        versions: Versions,
        start: Callable[[int], Awaitable[Replica]] | None,
        restarts: int,
    ) -> None:
        self._replicas, self._versions, self._start = replicas, versions, start
        self._numbers = {name: number for number, name in enumerate(replicas.by_name)}
        self._ending: set[str] = set()  # engines that are ended on purpose: they are restarted, or leave
        self._supervisor = Supervisor(replicas, restarts if start is not None else 0, self._restart)

    def begin(self) -> None:
        """Start watching the engines."""
        for name in self._replicas.by_name:
            self._replicas.watch(name)
        self._supervisor.begin()

    async def close(self) -> None:
        """Stop watching and restarting. The engines themselves are left to their owner."""
        await self._supervisor.close()
        await asyncio.gather(*(self._replicas.unwatch(name) for name in self._replicas.by_name))

    def changed(self, state: ReplicaState) -> None:
        """Restart an engine that died or is quarantined, unless it is ended on purpose."""
        if state.phase in (Phase.DEAD, Phase.QUARANTINED) and state.name not in self._ending:
            self._supervisor.lost(state.name)

    async def restart(self, name: str, bucket_bytes: int, deadline: float) -> None:
        """See `Fleet.restart`."""
        if self._start is None:
            raise NoEngineError(f"{name} was not started by this fleet, which can't restart it")
        self._require(name)
        await self._supervisor.forget(name)
        await self._restart(name, bucket_bytes, deadline)

    async def add(self, bucket_bytes: int, deadline: float) -> str:
        """See `Fleet.add`."""
        if self._start is None:
            raise NoEngineError("this fleet does not start its engines, and can't start one more")
        await self._replicas.weights_awake()
        number = max(self._numbers.values(), default=-1) + 1
        started = await self._start(number)
        self._numbers[started.engine.name] = number
        await self._begin(started, bucket_bytes, deadline)
        return started.engine.name

    async def remove(self, name: str, deadline: float) -> None:
        """See `Fleet.remove`."""
        replicas = self._replicas
        self._require(name)
        await self._supervisor.forget(name)
        self._ending.add(name)
        try:
            await replicas.apply(name, Leaving())
            try:
                async with asyncio.timeout(deadline), replicas.changed:
                    await replicas.changed.wait_for(lambda: replicas.observer.is_idle(name))
            except TimeoutError:
                logger.warning("%s leaves, and its requests are aborted", name)
                with suppress(EngineError):
                    await replicas.by_name[name].engine.abort()
            await self._end(name, "it has left")
            await replicas.remove(name)
            self._numbers.pop(name)
        finally:
            self._ending.discard(name)

    async def _restart(self, name: str, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> None:
        assert self._start is not None
        if name in self._ending:
            raise NoEngineError(f"{name} is being restarted, or leaves")
        self._ending.add(name)
        try:
            with self._replicas.event_log.restarting(name):
                await self._end(name, "it is being restarted")
                await self._begin(await self._start(self._numbers[name]), bucket_bytes, deadline)
        finally:
            self._ending.discard(name)

    async def _end(self, name: str, reason: str) -> None:
        await self._replicas.unwatch(name)
        await self._replicas.apply(name, Died(reason))
        await self._replicas.by_name[name].end()
        self._versions.loras.forget(name)

    async def _begin(self, started: Replica, bucket_bytes: int, deadline: float) -> None:
        """Add a new engine, and bring it the weights that the others serve."""
        name = started.engine.name
        await self._replicas.add(started)
        async with self._versions.changing:
            if self._state(name).phase is Phase.STARTING:  # otherwise a publish came first
                await self._replicas.apply(name, CatchingUp())
                await self._versions.catch_up(started, bucket_bytes, deadline)
            if self._state(name).phase is Phase.CATCHING_UP:  # neither the store nor the trainer has the version
                await self._replicas.apply(name, WeightsLost())
            if (asleep := self._replicas.asleep) and self._state(name).usable:  # the fleet fell asleep meanwhile
                await self._replicas.apply(name, Slept(asleep))
                await started.engine.sleep(asleep)

    def _state(self, name: str) -> ReplicaState:
        return self._replicas.snapshot.get(name)

    def _require(self, name: str) -> None:
        if not self._replicas.snapshot.has(name):
            raise NoEngineError(f"no engine is called {name}: {self._replicas.snapshot.describe()}")
