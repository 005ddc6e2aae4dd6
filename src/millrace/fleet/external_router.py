"""A router of others' before the fleet's engines: its list kept true, and requests sent by it where that is safe.

Its list has the engines that may serve, and no others: who leaves rotation is taken off at once, and nothing is sent
while somebody else stands there. A request goes by the router where any engine there may answer it; the others go
straight to the engine that suits them. So do all where the router is down, if the config says so.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

from millrace.continuation import call_id, generate_in_parts
from millrace.engines.http_engine import IDLE_POLL_SECONDS, HttpEngine
from millrace.engines.stock.engine import StockEngine
from millrace.errors import (
    EngineError,
    EngineFailed,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    LaunchError,
    LocalError,
    NoEngineError,
)
from millrace.fleet.event_log import EventLog
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import admissible
from millrace.fleet.supervisor import SETTLED_SECONDS, delay_before
from millrace.routers.base import RouterClient
from millrace.routers.start import StartedRouter
from millrace.types import GenerateRequest, Generation, Health, RoutingContext

LOOK_SECONDS = 2.0  # between two looks at the router's list, which others may change
JOIN_DEADLINE = 60.0  # seconds; SGLang's answer to the router's question generates a token
WAIT_SECONDS = 15.0  # that a request waits for the router, which is coming back or taking the first engine in

Start = Callable[[], Awaitable[StartedRouter]]
Direct = Callable[[GenerateRequest, RoutingContext, float], Awaitable[Generation]]
logger = logging.getLogger(__name__)


class ExternalRouter:
    """Made by `ExternalRouter.open`. `start` starts the router, or attaches to it. A router that ends by itself is
    started again, up to `restarts` times in a row. With `fallback`, requests go straight to the engines while the
    router does not answer."""

    def __init__(
        self,
        started: StartedRouter,
        members: ReplicaSet,
        event_log: EventLog,
        start: Start,
        *,
        fallback: bool,
        restarts: int,
    ) -> None:
        self._started, self._members, self._event_log, self._start = started, members, event_log, start
        self._fallback, self._restarts = fallback, restarts
        self._listed: frozenset[str] = frozenset()  # URLs of those that it sends requests
        self._filling = True  # the first engines join: who is in already must not get everything
        self._stale = False  # somebody stands in its list who must not be sent requests
        self._down: str | None = None  # why
        self._lost = False  # for good
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # by URL, whom it did not take, so that the log says so once
        self._inflight: Counter[str] = Counter()  # requests that may be at an engine, by its name
        self._turns = count()
        self._publishes = 0  # begun and ended: a request that saw this number change may have been cut short by one
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, members: ReplicaSet, event_log: EventLog, start: Start, *, fallback: bool, restarts: int
    ) -> "AsyncIterator[ExternalRouter]":
        """Keeps the router's list as long as the block runs, and ends the router that was started. Raises LaunchError
        where it does not come up."""
        external_router = cls(await start(), members, event_log, start, fallback=fallback, restarts=restarts)
        tasks = [asyncio.create_task(external_router._keep()), asyncio.create_task(external_router._follow())]
        try:
            yield external_router
        finally:
            tasks += external_router._joining.values()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await external_router._leave()
            await external_router._started.end()

    @property
    def router(self) -> RouterClient:
        return self._started.router

    @property
    def serving(self) -> bool:
        """Whether requests are sent by it now."""
        true = not self._stale and not self._filling and self._listed <= self._wanted.keys()
        return self._down is None and bool(self._listed) and true

    @property
    def engines(self) -> frozenset[str]:
        """Names of those that it sends requests."""
        return frozenset(name for url, name in self._wanted.items() if url in self._listed)

    def uses(self, engine: str) -> bool:
        """Whether a request may still be at this engine that came by the router."""
        return bool(self._inflight[engine])

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """A publish ends early what runs on engines that can't go on meanwhile. What it ends goes on afterwards."""
        self._publishes += 1
        try:
            yield
        finally:
            self._publishes += 1

    async def generate(
        self, request: GenerateRequest, routing: RoutingContext, *, deadline: float, direct: Direct
    ) -> Generation:
        """By the router where any of its engines may answer, else by `direct`. Raises what `Engine.generate` raises,
        and NoEngineError where the router is down and there is no other way."""
        end = time.monotonic() + deadline
        interrupted = False  # the last call ran while a publish interrupted the engines

        async def call(rest: GenerateRequest) -> Generation | None:
            nonlocal interrupted
            if not self._may_take(rest) or not await self._ready(routing, end):
                interrupted = False
                return await direct(rest, routing, end - time.monotonic())
            before = self._publishes
            try:
                return await self._send(rest, routing, end)
            except _NotSentError:
                return None
            finally:
                interrupted = bool(before % 2) or before != self._publishes

        return await generate_in_parts(request, call, goes_on=lambda: interrupted)

    def _may_take(self, request: GenerateRequest) -> bool:
        """An adapter belongs to one engine's weights, and the engine's own adapter sees to that. Raises EngineRefused
        for what the router would drop."""
        if "lora_path" in request.extra:
            return False
        if lost := self.router.dropped(request):
            raise EngineRefused(
                self.router.name,
                f"request {request.request_id}: it would drop extra.{min(lost)} without a word; leave that out, or "
                "run without a router",
            )
        return not any(member.lora for member in self._members.snapshot.routable.values())

    async def _ready(self, routing: RoutingContext, end: float) -> bool:
        """Waits until it can be sent by the router; False where it has to go straight."""
        until = min(end, time.monotonic() + WAIT_SECONDS)
        while True:
            routable = self._members.snapshot.routable
            if not routable or len(admissible(self._members.snapshot, routing)) < len(routable):
                return False  # to wait for an engine, and to choose one, is the fleet's own part
            if self.serving and not self._held:
                return True
            if self._fallback and self._down is not None:
                return False
            left = until - time.monotonic()
            if self._lost or left <= 0:
                if self._fallback:
                    return False
                why = self._down or "it has taken none of the engines in"
                raise NoEngineError(
                    f"{self.router.name} can't be used: {why}; with router.fallback: direct, requests would go straight"
                )
            # An engine that holds requests back tells nobody when it lets them go.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, IDLE_POLL_SECONDS if self._held else left)), self._changed:
                    await self._changed.wait()

    @property
    def _held(self) -> bool:
        """Whether one of the engines must not be sent requests now, since its weights are being updated."""
        engines = [self._members.replicas[name].engine for name in self.engines]
        return any(isinstance(engine, StockEngine) and engine.state.admission_closed for engine in engines)

    async def _send(self, request: GenerateRequest, routing: RoutingContext, end: float) -> Generation:
        """Raises _NotSentError where the router was not there to take it."""
        router, names = self.router, sorted(self.engines)
        by_name = {name: self._engine(name) for name in names}
        request = replace(request, request_id=call_id(request.request_id, next(self._turns)))
        self._inflight.update(names)
        try:
            with self._event_log.request(router.name) as asked:
                asked.made = await router.generate(by_name[names[0]], request, routing, deadline=end - time.monotonic())
                return asked.made
        except EngineUnreachable as error:
            self._fell(str(error))
            await self._abort(by_name, request.request_id)
            if not error.sent:
                raise _NotSentError from error
            raise
        except EngineFailed:
            self._wake.set()
            await self._suspect(by_name)
            raise
        except (EngineTimeout, asyncio.CancelledError):
            await self._abort(by_name, request.request_id)
            raise
        finally:
            self._inflight.subtract(names)
            await self._members.notify()

    async def _abort(self, engines: Mapping[str, HttpEngine], request_id: str) -> None:
        """On every engine that it may be at. Where this fails the server sees the closed connection."""

        async def abort(engine: HttpEngine) -> None:
            with suppress(EngineError):
                await engine.abort_by_router(request_id)

        await asyncio.gather(*(abort(engine) for engine in engines.values()))

    async def _suspect(self, engines: Mapping[str, HttpEngine]) -> None:
        """The router does not say which engine failed, so they are asked which of them is dead."""

        async def look_at(name: str, engine: HttpEngine) -> None:
            if await engine.health() is Health.DEAD:
                await self._members.suspect(
                    name, EngineUnreachable(name, "nothing takes connections at its port", sent=False)
                )

        await asyncio.gather(*(look_at(name, engine) for name, engine in engines.items()))

    def _engine(self, name: str) -> HttpEngine:
        engine = self._members.replicas[name].engine
        assert isinstance(engine, HttpEngine)
        return engine

    @property
    def _wanted(self) -> Mapping[str, str]:
        """By URL, the names of those that may serve."""
        return {member.url: name for name, member in self._members.snapshot.routable.items()}

    def _fell(self, reason: str) -> None:
        """It does not answer."""
        if self._down is None:
            self._down, self._listed = reason, frozenset()
            meanwhile = "requests go straight to the engines" if self._fallback else "requests wait for it"
            logger.warning("%s is down, %s: %s", self.router.name, meanwhile, reason)
            self._event_log.emit("router_down", self.router.name, reason=reason.partition("\n")[0])
        self._wake.set()

    async def _follow(self) -> None:
        """Every new snapshot is a reason to look at the list."""
        while True:
            async with self._members.changed:
                await self._members.changed.wait()
            self._wake.set()

    async def _keep(self) -> None:
        attempts, since = 0, time.monotonic()
        while True:
            self._wake.clear()
            if self._started.process is not None and not self._started.process.running:
                reason = self._started.process.describe_end()
                self._fell(f"{reason}\n{self._started.process.log_tail()}")
                if time.monotonic() - since > SETTLED_SECONDS:
                    attempts = 0
                if attempts >= self._restarts:
                    self._lost = True
                    logger.error("%s stays down: it was started anew %d times", self.router.name, attempts)
                    await self._tell()
                    return
                attempts, since = attempts + 1, await self._anew(attempts)
            try:
                await self._true_up()
            except LocalError as error:
                logger.warning("the list of %s could not be compared: %s", self.router.name, error)
            except EngineError as error:
                self._fell(str(error))
            await self._tell()
            await self._pause(LOOK_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Until there is something to do. The end of the router's process is one of these."""
        process = self._started.process
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._wake.wait())]
        if process is not None and process.running:
            waits.append(asyncio.create_task(process.wait()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _anew(self, attempt: int) -> float:
        """Starts it anew; returns when that was."""
        await asyncio.sleep(delay_before(attempt))
        await self._started.end()
        try:
            self._started = await self._start()
        except LaunchError as error:
            logger.error("%s did not come back: %s", self.router.name, error)
        return time.monotonic()

    async def _true_up(self) -> None:
        """Makes the router's list that of the engines that may serve. Raises EngineError where it does not answer."""
        router, wanted = self.router, self._wanted
        listed = await router.workers()
        strangers = listed.keys() - wanted.keys()
        self._stale = bool(strangers)
        for url, task in list(self._joining.items()):
            if url not in wanted:
                task.cancel()
        await asyncio.gather(*(router.deregister(url) for url in strangers))
        if strangers:
            self._stale = bool((await router.workers()).keys() - wanted.keys())
        self._listed = frozenset(url for url, takes in listed.items() if takes and url in wanted)
        self._filling = not self._listed or (
            self._filling and bool(wanted.keys() - self._listed - self._refused.keys())
        )
        if self._down is not None:
            logger.warning("%s is up again", router.name)
            self._event_log.emit("router_up", router.name)
            self._down = None
        for url in wanted.keys() - listed.keys() - self._joining.keys():
            self._joining[url] = asyncio.create_task(self._join(url, wanted[url]))

    async def _join(self, url: str, name: str) -> None:
        try:
            await self.router.register(self._engine(name), deadline=JOIN_DEADLINE)
            self._refused.pop(url, None)
        except EngineError as error:
            if url not in self._refused:
                logger.error("%s did not take %s in: %s", self.router.name, name, error)
            self._refused[url] = str(error)
            await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._joining.pop(url, None)
            self._wake.set()

    async def _leave(self) -> None:
        """Off the list of a router that goes on without us."""
        if self._started.process is None:
            for url in self._wanted:
                with suppress(EngineError):
                    await self.router.deregister(url)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _NotSentError(Exception):
    """The router was not there: no engine has seen the request."""
