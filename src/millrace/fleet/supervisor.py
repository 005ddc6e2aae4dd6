"""Restarts of engines that died, hang or are quarantined: with a growing delay, and a limited number of times."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from millrace.errors import MillraceError
from millrace.fleet.replica_state import MAX_FAILURES, Answered, CallFailed, Died, Phase
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.types import Health

PROBE_SECONDS = 2.0
SUSPECT_SECONDS = 10.0  # of silence, after which requests are sent to other engines
HANG_SECONDS = 60.0  # of silence; longer than any step of an engine that is only busy
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a restart; each failed restart doubles the next delay
SETTLED_SECONDS = 300.0  # of service, after which earlier restarts no longer count

logger = logging.getLogger(__name__)


def delay_before(attempt: int) -> float:
    """Return the seconds to wait before the restart of this number, counted from 0."""
    return min(FIRST_DELAY * 2.0**attempt, LONGEST_DELAY)


class Supervisor:
    """Probes the engines of a fleet, and restarts those that are lost.

    `limit`: restarts of one engine in a row; 0 for none. `restart` starts an engine again, and returns when it holds
    the weights that the others serve.
    """

    def __init__(self, replicas: OwnedReplicaSet, limit: int, restart: Callable[[str], Awaitable[None]]) -> None:
        self._replicas, self._limit, self._restart = replicas, limit, restart
        self._attempts: dict[str, int] = {}
        self._served_since: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._prober: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start probing."""
        self._prober = asyncio.create_task(self._probe_all())

    async def close(self) -> None:
        """Stop probing, and cancel the restarts."""
        self._limit = 0
        tasks = [*self._restarts.values(), *([self._prober] if self._prober is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def lost(self, name: str) -> None:
        """Restart an engine that is dead or quarantined, unless it has been restarted too often."""
        if name in self._restarts:
            return
        if time.monotonic() - self._served_since.pop(name, time.monotonic()) > SETTLED_SECONDS:
            self._attempts.pop(name, None)
        if self._attempts.get(name, 0) < self._limit:
            self._replicas.coming.add(name)
            self._restarts[name] = asyncio.create_task(self._bring_back(name))

    async def forget(self, name: str) -> None:
        """Cancel the restart of an engine, and forget its earlier restarts and its silence."""
        if (task := self._restarts.pop(name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._replicas.coming.discard(name)  # a task that was cancelled before its first step has not done it
        for known in (self._attempts, self._served_since, self._silent_since):
            known.pop(name, None)

    async def _bring_back(self, name: str) -> None:
        """Restart a lost engine until it is usable or the limit is reached."""
        try:
            while (attempt := self._attempts.get(name, 0)) < self._limit:
                self._attempts[name] = attempt + 1
                await asyncio.sleep(delay_before(attempt))
                await self._replicas.weights_awake()  # until then the memory is the trainer's
                try:
                    await self._restart(name)
                except MillraceError as error:
                    logger.error("%s did not come back (%d of %d): %s", name, attempt + 1, self._limit, error)
                    continue
                if not self._replicas.snapshot.get(name).usable:
                    continue
                self._served_since[name] = time.monotonic()
                logger.warning("%s was restarted (%d of %d)", name, attempt + 1, self._limit)
                return
            logger.error("%s stays out: it was restarted %d times", name, self._limit)
        finally:
            self._restarts.pop(name, None)
            self._replicas.coming.discard(name)
            await self._replicas.notify()

    async def _probe_all(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            states = self._replicas.snapshot.replicas
            probed = [s for s in states if s.phase in (Phase.READY, Phase.SUSPECT) and not s.asleep]
            await asyncio.gather(*(self._probe(state.name) for state in probed))

    async def _probe(self, name: str) -> None:
        health = await self._replicas.by_name[name].engine.health()
        state = next((s for s in self._replicas.snapshot.replicas if s.name == name), None)
        if state is None or state.asleep:
            return
        if health is not Health.BUSY:  # UNKNOWN is a fault of this process, and must not count as the engine's silence
            self._silent_since.pop(name, None)
        if health is Health.DEAD:
            await self._replicas.apply(name, CallFailed("nothing takes connections at its port"))
        elif health is Health.BUSY:
            silent = time.monotonic() - self._silent_since.setdefault(name, time.monotonic())
            await self._silent(name, silent)
        elif health is not Health.UNKNOWN and state.phase is Phase.SUSPECT:
            await self._replicas.apply(name, Answered())

    async def _silent(self, name: str, seconds: float) -> None:
        """Act on an engine that has not answered for so many seconds."""
        reason = f"it has not answered for {seconds:.0f} s"
        if seconds >= HANG_SECONDS:
            logger.error("%s: %s", name, reason)
            await self._replicas.apply(name, Died(reason) if self._limit else CallFailed(reason, MAX_FAILURES))
        elif seconds >= SUSPECT_SECONDS:
            await self._replicas.apply(name, CallFailed(reason, MAX_FAILURES))
