"""The lifecycle of a fleet's engines: starting, restarting, adding and removing them."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable

from millrace.engines.start import Replica
from millrace.errors import NoEngineError
from millrace.fleet.draining import drained, moved
from millrace.fleet.replica_state import CatchingUp, Died, Leaving, Phase, ReplicaState, Slept, WeightsLost
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.fleet.supervisor import Supervisor
from millrace.fleet.versions import Versions

BUCKET_BYTES = 256 * 2**20
CATCH_UP_DEADLINE = 120.0
MOVE_SECONDS = 5.0  # for the requests of an engine that leaves to come back, once they are aborted


class Lifecycle:
    """Starts and ends the engines of a fleet. `start` starts the engine of that number; None if this fleet starts none.
    `restarts`: how often in a row an engine is restarted automatically. `leaving`: the engines that leave the fleet."""

    def __init__(
        self,
        replicas: OwnedReplicaSet,
        versions: Versions,
        start: Callable[[int], Awaitable[Replica]] | None,
        restarts: int,
    ) -> None:
        self._replicas, self._versions, self._start = replicas, versions, start
        self._numbers = {name: number for number, name in enumerate(replicas.by_name)}
        self.leaving: set[str] = set()
        self._starting: set[int] = set()  # the numbers of engines that are being added
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
        taken = self._starting.union(self._numbers.values())
        number = next(number for number in itertools.count() if number not in taken)
        expected = f"engine {number}"
        self._starting.add(number)
        await self._replicas.expect(expected)
        try:
            await self._replicas.weights_awake()
            started = await self._start(number)
            self._numbers[started.engine.name] = number
            self._replicas.coming.discard(expected)
            expected = started.engine.name
            self._replicas.coming.add(expected)
            await self._begin(started, bucket_bytes, deadline)
        finally:
            self._starting.discard(number)
            await self._replicas.expect(expected, coming=False)
        return expected

    async def remove(self, name: str, deadline: float, *, at_once: bool = False) -> None:
        """See `Fleet.remove` and, with `at_once`, `Fleet.preempt`."""
        self._require(name)
        if name in self.leaving:
            raise NoEngineError(f"{name} leaves already")
        ends = time.monotonic() + deadline
        self.leaving.add(name)
        try:
            await self._supervisor.forget(name)
            self._require_free(name)
            await self._leave(name, ends, at_once=at_once)
        finally:
            self.leaving.discard(name)

    async def _leave(self, name: str, ends: float, *, at_once: bool) -> None:
        replicas = self._replicas
        self._ending.add(name)
        try:
            await replicas.apply(name, Leaving())
            # An engine that is preempted gives its requests back as soon as another takes them, and early enough.
            grace = max(ends - time.monotonic() - (MOVE_SECONDS if at_once else 0.0), 0.0)
            others = (lambda: bool(replicas.snapshot.routable)) if at_once else (lambda: False)
            if not await drained(replicas, name, grace, otherwise=others):
                await moved(replicas, name, max(ends - time.monotonic(), MOVE_SECONDS))
            await self._end(name, "it has left")
            await replicas.remove(name)
            self._numbers.pop(name)
        finally:
            self._ending.discard(name)

    @property
    def starts(self) -> bool:
        """Whether this fleet starts engines."""
        return self._start is not None

    def is_lost(self, state: ReplicaState) -> bool:
        """Return whether an engine has ended, or must not serve, and nothing is done about it."""
        known = state.name in self._ending or state.name in self._replicas.coming
        return state.phase in (Phase.DEAD, Phase.QUARANTINED) and not known

    async def _restart(self, name: str, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> None:
        assert self._start is not None
        self._require_free(name)
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
                await self._versions.catch_up(started, self._serving, bucket_bytes, deadline)
            if self._state(name).phase is Phase.CATCHING_UP:  # neither the store nor the trainer has the version
                await self._replicas.apply(name, WeightsLost())
            if (asleep := self._replicas.asleep) and self._state(name).usable:  # the fleet fell asleep meanwhile
                await self._replicas.apply(name, Slept(asleep))
                await started.engine.sleep(asleep)

    def _serving(self, base: int) -> list[Replica]:
        """Return the engines that serve this whole version, or an adapter over it."""
        names = [name for name, state in self._replicas.snapshot.routable.items() if state.base == base]
        return [self._replicas.by_name[name] for name in names]

    def _state(self, name: str) -> ReplicaState:
        return self._replicas.snapshot.get(name)

    def _require(self, name: str) -> None:
        if not self._replicas.snapshot.has(name):
            raise NoEngineError(f"no engine is called {name}: {self._replicas.snapshot.describe()}")

    def _require_free(self, name: str) -> None:
        if name in self._ending:
            raise NoEngineError(f"{name} is being restarted, or leaves")
