"""Adds engines to a fleet and removes them, by its load, and replaces those that were preempted."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from millrace.config.engines import ReplicaRange
from millrace.engines.start import Replica
from millrace.errors import EngineError, LaunchError, MillraceError, NoEngineError
from millrace.fleet.admission import Admission
from millrace.fleet.event_log import EventLog, reason_of
from millrace.fleet.lifecycle import BUCKET_BYTES, CATCH_UP_DEADLINE, Lifecycle
from millrace.fleet.replica_state import Phase
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.fleet.scaling import Load, Scaling
from millrace.fleet.supervisor import delay_before
from millrace.fleet.versions import Versions
from millrace.types import EngineLoad

LOOK_SECONDS = 0.5  # between two looks at the load
REPORT_DEADLINE = 2.0  # seconds for an engine to report its load
GRACE_SECONDS = 60.0  # for the requests of an engine that is removed to end before they move
AVOID_SECONDS = 2.0  # for a launcher to note that a host goes away

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetSize:
    """The number of engines of a fleet: wanted, serving, and starting (or getting their weights).

    wanted: by the load; in a fleet of a fixed size, its engines, those that have died included.
    """

    wanted: int
    serving: int
    starting: int


class Autoscaler:
    """Keeps the number of engines of a fleet where its load needs it. Open and end it with `begin` and `close`."""

    def __init__(
        self,
        replicas: OwnedReplicaSet,
        admission: Admission,
        lifecycle: Lifecycle,
        versions: Versions,
        event_log: EventLog,
    ) -> None:
        self._replicas, self._admission, self._lifecycle = replicas, admission, lifecycle
        self._versions, self._event_log = versions, event_log
        self._scaling: Scaling | None = None
        self._owed = 0  # replacements of preempted engines that are not started yet, in a fleet of a fixed size
        self._wanted = 0  # what else needs an engine now, such as a publish
        self._adding: set[asyncio.Task[None]] = set()
        self._removing: set[asyncio.Task[None]] = set()
        self._waiting_since: float | None = None
        self._failures, self._not_before = 0, 0.0  # starts that failed in a row, and when the next may begin
        self._target: int | None = None
        self._looking: asyncio.Task[None] | None = None

    def begin(self, limits: ReplicaRange | None) -> None:
        """Start looking at the load."""
        self.limit(limits)
        self._looking = asyncio.create_task(self._look_again_and_again())

    async def close(self) -> None:
        """Stop, and cancel the starts under way."""
        tasks = [*self._adding, *self._removing, *([self._looking] if self._looking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def limit(self, limits: ReplicaRange | None) -> None:
        """Change the bounds of the number of engines. None leaves the number as it is."""
        self._scaling, self._target = None if limits is None else Scaling(limits), None
        self._owe(0)

    async def remove(self, name: str, deadline: float) -> None:
        """See `Fleet.remove`. The engine leaves even if the caller stops waiting."""
        await asyncio.shield(self._run(self._removing, self._lifecycle.remove(name, deadline)))

    async def preempt(self, name: str, deadline: float, host: str | None) -> None:
        """See `Fleet.preempt`. The engine leaves even if the caller stops waiting."""
        await asyncio.shield(self._run(self._removing, self._preempt_by_hand(name, time.monotonic() + deadline, host)))

    async def _preempt_by_hand(self, name: str, ends: float, host: str | None) -> None:
        replica = self._replicas.by_name.get(name)
        if replica is not None and (process := replica.process) is not None:
            hosts = process.hosts if host is None else {host}.intersection(process.hosts)
            try:
                async with asyncio.timeout(AVOID_SECONDS):
                    await asyncio.gather(*(process.avoid(one, ends - time.monotonic()) for one in hosts))
            except (LaunchError, TimeoutError) as error:
                reason = str(error) or f"its launcher did not answer within {AVOID_SECONDS:.0f} s"
                logger.warning("the replacement of %s may start on the host that goes away: %s", name, reason)
        await self._preempt(name, max(ends - time.monotonic(), 0.0))

    async def _preempt(self, name: str, deadline: float) -> None:
        # A fleet with bounds starts what is missing by itself.
        owed = int(self._scaling is None and self._lifecycle.starts and self._replicas.snapshot.has(name))
        self._owe(owed)
        try:
            await self._lifecycle.remove(name, deadline, at_once=True)
        except NoEngineError:  # it leaves already, or is being restarted
            self._owe(-owed)
            raise

    def noticed(self, replica: Replica, seconds: float) -> None:
        """Preempt an engine whose host goes away in so many seconds, as its launcher has learned."""
        logger.warning("the host of %s goes away in %.0f s", replica.engine.name, seconds)
        self._run(self._removing, self._leave(replica, time.monotonic() + seconds))

    async def _leave(self, replica: Replica, ends: float) -> None:
        name = replica.engine.name
        # An engine that joins or restarts does so first: it is a replacement itself, and counted when it has joined.
        with suppress(TimeoutError):
            async with asyncio.timeout(ends - time.monotonic()), self._replicas.changed:
                await self._replicas.changed.wait_for(lambda: name not in self._replicas.coming)
        if self._replicas.by_name.get(name) is not replica:
            return  # it has left, or runs elsewhere now
        try:
            await self._preempt(name, max(ends - time.monotonic(), 0.0))
        except NoEngineError as error:
            logger.warning("%s", error)

    def _owe(self, more: int) -> None:
        self._owed = max(self._owed + more, 0)
        self._replicas.elastic = self._scaling is not None or self._owed > 0

    @contextmanager
    def wanting(self) -> Iterator[None]:
        """Return a context for something that needs an engine, such as a publish."""
        self._wanted += 1
        try:
            yield
        finally:
            self._wanted -= 1

    @property
    def size(self) -> FleetSize:
        """The number of engines."""
        states, coming = self._replicas.snapshot.replicas, self._replicas.coming
        serving = len(self._replicas.snapshot.routable)
        starting = len({s.name for s in states if s.phase in (Phase.STARTING, Phase.CATCHING_UP)} | coming)
        if self._target is not None:
            return FleetSize(self._target, serving, starting)
        members = {state.name for state in states if state.name not in self._lifecycle.leaving} | coming
        return FleetSize(len(members) + max(self._owed - len(self._adding), 0), serving, starting)

    @property
    def demand(self) -> int:
        """The requests that wait for room on an engine, or for the first engine, those of followers included."""
        return self._admission.demand + self._replicas.followers_waiting

    @property
    def _present(self) -> int:
        """The engines that serve now or may serve again by themselves, and those that are being started."""
        return len({state.name for state in self._replicas.snapshot.replicas if state.usable} | self._replicas.coming)

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._scaling is None and not self._owed:
                continue
            try:
                await self._look()
            except Exception:  # a defect here must not end the scaling unseen
                logger.exception("the fleet could not be scaled")

    async def _look(self) -> None:
        if self._scaling is None:
            self._add(self._owed - len(self._adding))
            return
        for state in self._replicas.snapshot.replicas:
            if self._lifecycle.is_lost(state):
                self._run(self._removing, self._remove(state.name, 0.0))
        if (load := await self._load()) is None:
            return
        now = time.monotonic()
        wanted, engines = self._scaling.engines(load, now), load.serving + load.starting
        if not wanted and not self._versions.recoverable:
            wanted = 1  # the next engine would come without the weights
        if wanted != self._target and wanted != engines:
            what = f"{load.waiting} requests wait, {load.running} run"
            logger.info("the fleet should have %d engines and has %d: %s", wanted, engines, what)
            self._event_log.emit("scale", wanted=wanted, engines=engines, waiting=load.waiting, running=load.running)
        self._target = wanted
        if wanted > engines:
            self._add(wanted - engines)
        elif wanted < engines and not (self._adding or self._removing or self._versions.changing.locked()):
            self._remove_one()

    def _remove_one(self) -> None:
        """Begin to remove the engine that serves with the least work; of equal ones the last one."""
        if routable := self._replicas.snapshot.routable:
            name = min(routable, key=lambda one: (self._admission.outstanding[one], _last(one)))
            self._run(self._removing, self._remove(name, GRACE_SECONDS))

    async def _load(self) -> Load | None:
        """Return the load; None if an engine does not report its own, so that it is not known."""
        replicas = self._replicas
        if replicas.asleep:  # the engines' memory is the trainer's: their number stays
            return Load(starting=self._present, wanted=self._present)
        names = list(replicas.snapshot.routable)
        reports = await asyncio.gather(*(self._report(name) for name in names))
        loads = {name: load for name, load in zip(names, reports, strict=True) if name in replicas.snapshot.routable}
        known = {name: load for name, load in loads.items() if load is not None}
        if len(known) < len(loads):
            return None
        waiting, now = self.demand, time.monotonic()
        self._waiting_since = (self._waiting_since or now) if waiting else None
        limits = [replicas.by_name[name].info.max_running for name in known]
        own = {name: self._admission.running(name) for name in known}
        return Load(
            waiting=waiting,
            waited=0.0 if self._waiting_since is None else now - self._waiting_since,
            running=sum(max(load.running_requests + load.waiting_requests, own[name]) for name, load in known.items()),
            room=None if None in limits else sum(limit for limit in limits if limit is not None),
            headroom=self._headroom(known),
            serving=len(known),
            starting=self._present - len(known),
            wanted=min(self._wanted, 1),
        )

    def _headroom(self, loads: Mapping[str, EngineLoad]) -> float:
        """Return the share of the KV caches that stays free, as forecast and as the engines report it."""
        size = sum(load.max_tokens for load in loads.values())
        if not size:
            return 1.0
        free = 0
        for name, load in loads.items():
            forecast, reported = self._admission.headroom(name), load.max_tokens - load.used_tokens
            free += reported if forecast is None else min(forecast, reported)
        return min(max(free / size, 0.0), 1.0)

    async def _report(self, name: str) -> EngineLoad | None:
        try:
            async with asyncio.timeout(REPORT_DEADLINE):
                return await self._replicas.by_name[name].engine.loads()
        except (EngineError, TimeoutError):
            return None

    def _add(self, count: int) -> None:
        """Begin to start so many engines, unless the last start failed a moment ago."""
        if time.monotonic() >= self._not_before:
            for _ in range(count):
                self._run(self._adding, self._start_one())

    async def _start_one(self) -> None:
        started = time.monotonic()
        try:
            name = await self._lifecycle.add(BUCKET_BYTES, CATCH_UP_DEADLINE)
        except MillraceError as error:
            self._event_log.scaled("up", None, time.monotonic() - started, reason_of(error))
            if not self._failures:
                logger.warning("the fleet has %d engines, and tries again to start one: %s", self.size.serving, error)
            if time.monotonic() >= self._not_before:  # several starts may fail at the same time
                self._not_before = time.monotonic() + delay_before(self._failures)
                self._failures += 1
            return
        self._failures = 0
        self._owe(-1)
        self._event_log.scaled("up", name, time.monotonic() - started, None)
        logger.info("%s has joined the fleet", name)

    async def _remove(self, name: str, grace: float) -> None:
        started = time.monotonic()
        try:
            await self._lifecycle.remove(name, grace)
        except MillraceError as error:
            logger.warning("%s was not removed: %s", name, error)
            return
        self._event_log.scaled("down", name, time.monotonic() - started, None)
        logger.info("%s has left the fleet", name)

    def _run(self, tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task


def _last(name: str) -> int:
    """Return the engine's number, negated."""
    number = name.rpartition("-")[2]
    return -int(number) if number.isdigit() else 0
