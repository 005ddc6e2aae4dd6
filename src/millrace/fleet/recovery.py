"""Engines come back: who does not answer is found out, and who is dead is started anew, ever later and not for ever."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from millrace.errors import MillraceError
from millrace.fleet.owned_replica_set import OwnedReplicaSet
from millrace.fleet.replica_state import MAX_FAILURES, Answered, CallFailed, Died, Phase
from millrace.types import Health

PROBE_SECONDS = 2.0
SUSPECT_SECONDS = 10.0  # of silence, after which requests go elsewhere
HANG_SECONDS = 60.0  # of silence; longer than any step of an engine that is only busy
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a restart; each one that fails doubles the next
SETTLED_SECONDS = 300.0  # of service, after which earlier restarts count no more

logger = logging.getLogger(__name__)


def delay_before(attempt: int) -> float:
    """Seconds to wait before the restart of this number, from 0."""
    return min(FIRST_DELAY * 2.0**attempt, LONGEST_DELAY)


class Recovery:
    """Watches over a fleet's engines. `limit`: restarts of one engine in a row; 0: none is started anew.

    `restart` starts an engine anew and returns when it holds what the others serve; `awake` returns when the engines
    may take memory.
    """

    def __init__(
        self,
        replica_set: OwnedReplicaSet,
        limit: int,
        restart: Callable[[str], Awaitable[None]],
        awake: Callable[[], Awaitable[None]],
    ) -> None:
        self._replicas, self._limit, self._restart, self._awake = replica_set, limit, restart, awake
        self._attempts: dict[str, int] = {}
        self._served_since: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._prober: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Watches from now on."""
        self._prober = asyncio.create_task(self._probe())

    async def close(self) -> None:
        self._limit = 0
        tasks = [*self._restarts.values(), *([self._prober] if self._prober is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def lost(self, name: str) -> None:
        """The engine is dead or not to be trusted: it is started anew, if it has not been too often."""
        if name in self._restarts:
            return
        if time.monotonic() - self._served_since.pop(name, time.monotonic()) > SETTLED_SECONDS:
            self._attempts.pop(name, None)
        if self._attempts.get(name, 0) < self._limit:
            self._replicas.coming.add(name)
            self._restarts[name] = asyncio.create_task(self._bring_back(name))

    async def forget(self, name: str) -> None:
        """The engine leaves the fleet."""
        if (task := self._restarts.pop(name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._replicas.coming.discard(name)  # a task that had not begun has not done it
        for known in (self._attempts, self._served_since, self._silent_since):
            known.pop(name, None)

    async def _bring_back(self, name: str) -> None:
        try:
            while (attempt := self._attempts.get(name, 0)) < self._limit:
                self._attempts[name] = attempt + 1
                await asyncio.sleep(delay_before(attempt))
                await self._awake()
                try:
                    await self._restart(name)
                except MillraceError as error:
                    logger.error("%s did not come back (%d of %d): %s", name, attempt + 1, self._limit, error)
                    continue
                if not self._replicas.snapshot.get(name).usable:
                    continue
                self._served_since[name] = time.monotonic()
                logger.warning("%s was started anew (%d of %d)", name, attempt + 1, self._limit)
                return
            logger.error("%s stays out: it was started anew %d times", name, self._limit)
        finally:
            self._restarts.pop(name, None)
            self._replicas.coming.discard(name)
            await self._replicas.tell()

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            members = self._replicas.snapshot.members
            asked = [m for m in members if m.phase in (Phase.READY, Phase.SUSPECT) and not m.asleep]
            await asyncio.gather(*(self._look_at(member.name) for member in asked))

    async def _look_at(self, name: str) -> None:
        health = await self._replicas.replicas[name].engine.health()
        member = next((m for m in self._replicas.snapshot.members if m.name == name), None)
        if member is None or member.asleep:
            return
        if health is not Health.BUSY:
            self._silent_since.pop(name, None)
        if health is Health.DEAD:
            await self._replicas.apply(name, CallFailed("nothing takes connections at its port"))
        elif health is Health.BUSY:
            silent = time.monotonic() - self._silent_since.setdefault(name, time.monotonic())
            reason = f"it has not answered for {silent:.0f} s"
            if silent >= HANG_SECONDS:
                logger.error("%s: %s", name, reason)
                await self._replicas.apply(name, Died(reason) if self._limit else CallFailed(reason, MAX_FAILURES))
            elif silent >= SUSPECT_SECONDS:
                await self._replicas.apply(name, CallFailed(reason, MAX_FAILURES))
        elif health is not Health.UNKNOWN and member.phase is Phase.SUSPECT:
            await self._replicas.apply(name, Answered())
