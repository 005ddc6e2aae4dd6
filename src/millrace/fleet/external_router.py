"""An external router in front of the fleet's engines (SGLang's or vLLM's).

This module keeps the router's list of engines equal to the set of engines that may serve. An engine that leaves
rotation is removed at once, and no request goes through the router while its list has an engine that may not serve. A
request goes through the router if every engine in the list may answer it. Other requests go straight to an engine. If
the config allows it, all requests do so while the router is down.
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
from millrace.fleet.replica_state import Phase
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import admissible
from millrace.fleet.supervisor import SETTLED_SECONDS, delay_before
from millrace.routers.base import RouterClient
from millrace.routers.start import StartedRouter
from millrace.types import GenerateRequest, Generation, Health, RoutingContext

LOOK_SECONDS = 2.0  # between checks of the router's list, which other programs may change
JOIN_DEADLINE = 60.0  # seconds; SGLang generates a token to answer the router's health check
WAIT_SECONDS = 15.0  # for which a request waits for a router that restarts or has no engines yet

Start = Callable[[], Awaitable[StartedRouter]]
Direct = Callable[[GenerateRequest, RoutingContext, float], Awaitable[Generation]]
logger = logging.getLogger(__name__)


class ExternalRouter:
    """A running external router. Open one with `ExternalRouter.open`.

    `start` starts the router, or attaches to one that runs. A router that exits is restarted up to `restarts` times in
    a row. With `fallback`, requests go straight to the engines while the router does not answer.
    """

    def __init__(
        self,
        started: StartedRouter,
        replicas: ReplicaSet,
        event_log: EventLog,
        start: Start,
        *,
        fallback: bool,
        restarts: int,
    ) -> None:
        self._started, self._replicas, self._event_log, self._start = started, replicas, event_log, start
        self._fallback, self._restarts = fallback, restarts
        self._listed: frozenset[str] = frozenset()  # URLs of the engines to which it sends requests
        self._filling = True  # until the first engines have joined, so that the first does not get all requests
        self._stale = False  # its list has an engine that may not serve
        self._down: str | None = None  # the reason, while it does not answer
        self._lost = False  # it is not restarted any more
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # by URL, the engines that it refused; each is logged once
        self._inflight: Counter[str] = Counter()  # by engine, the requests that it may be running
        self._turns = count()
        self._publishes = (
            0  # begun plus ended: if it changes during a request, a publish may have interrupted the request
        )
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, replicas: ReplicaSet, event_log: EventLog, start: Start, *, fallback: bool, restarts: int
    ) -> "AsyncIterator[ExternalRouter]":
        """Start the router, keep its list while the context is open, and end it if it was started here.

        Raises LaunchError if the router does not start.
        """
        external_router = cls(await start(), replicas, event_log, start, fallback=fallback, restarts=restarts)
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
        """The client of the router."""
        return self._started.router

    @property
    def serving(self) -> bool:
        """Whether requests may go through the router now."""
        current = not self._stale and not self._filling and self._listed <= self._wanted.keys()
        return self._down is None and bool(self._listed) and current

    @property
    def engines(self) -> frozenset[str]:
        """The names of the engines to which the router sends requests."""
        return frozenset(name for url, name in self._wanted.items() if url in self._listed)

    def uses(self, engine: str) -> bool:
        """Whether this engine may still be running a request that came through the router."""
        return bool(self._inflight[engine])

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Return a context for a publish. Requests that the publish interrupts are continued when it has ended."""
        self._publishes += 1
        try:
            yield
        finally:
            self._publishes += 1

    async def generate(
        self, request: GenerateRequest, routing: RoutingContext, *, deadline: float, direct: Direct
    ) -> Generation:
        """Send the request through the router if all its engines may answer it, and otherwise with `direct`.

        Raises what `Engine.generate` raises, and NoEngineError if the router is down and `fallback` is off.
        """
        end = time.monotonic() + deadline
        interrupted = False  # the last call ran while a publish interrupted the engines, or one of them leaves

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
                leaving = any(state.phase is Phase.DRAINING for state in self._replicas.snapshot.replicas)
                interrupted = bool(before % 2) or before != self._publishes or leaving

        return await generate_in_parts(request, call, goes_on=lambda: interrupted)

    def _may_take(self, request: GenerateRequest) -> bool:
        """Return whether the request may go through the router. Requests with a LoRA adapter may not, nor those whose
        stop texts or penalties count continued tokens, since a router may drop the number of these.

        Raises EngineRefused if the router would drop a field of the request.
        """
        sampling = request.sampling
        if "lora_path" in request.extra or (request.continued_tokens and (sampling.stop or sampling.penalizes)):
            return False
        if lost := self.router.dropped(request):
            raise EngineRefused(
                self.router.name,
                f"request {request.request_id}: the router would drop {min(lost)} silently; leave it out, or run "
                "without a router",
            )
        return not any(state.lora for state in self._replicas.snapshot.routable.values())

    async def _ready(self, routing: RoutingContext, end: float) -> bool:
        """Wait until the router can take the request. Return False if the request must go straight to an engine."""
        until = min(end, time.monotonic() + WAIT_SECONDS)
        while True:
            routable = self._replicas.snapshot.routable
            if not routable or len(admissible(self._replicas.snapshot, routing)) < len(routable):
                return False  # the fleet itself waits for an engine, and chooses one
            if self.serving and not self._updating:
                return True
            if self._fallback and self._down is not None:
                return False
            left = until - time.monotonic()
            if self._lost or left <= 0:
                if self._fallback:
                    return False
                why = self._down or "it has accepted none of the engines"
                raise NoEngineError(
                    f"{self.router.name} can't be used: {why}; with router.fallback: direct, requests would go straight"
                )
            # No event marks the end of an engine's update, so poll for it.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, IDLE_POLL_SECONDS if self._updating else left)), self._changed:
                    await self._changed.wait()

    @property
    def _updating(self) -> bool:
        """Whether the weights of an engine are being updated, so that it must not get requests."""
        engines = [self._replicas.by_name[name].engine for name in self.engines]
        return any(isinstance(engine, StockEngine) and engine.state.admission_closed for engine in engines)

    async def _send(self, request: GenerateRequest, routing: RoutingContext, end: float) -> Generation:
        """Send the request through the router. Raises _NotSentError if the router could not be reached."""
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
            await self._replicas.notify()

    async def _abort(self, engines: Mapping[str, HttpEngine], request_id: str) -> None:
        """Abort the request on every engine that may have it. If that fails, the closed connection ends it."""

        async def abort(engine: HttpEngine) -> None:
            with suppress(EngineError):
                await engine.abort_by_router(request_id)

        await asyncio.gather(*(abort(engine) for engine in engines.values()))

    async def _suspect(self, engines: Mapping[str, HttpEngine]) -> None:
        """Find out which engine is dead: the router does not say which one failed."""

        async def probe(name: str, engine: HttpEngine) -> None:
            if await engine.health() is Health.DEAD:
                await self._replicas.suspect(
                    name, EngineUnreachable(name, "nothing takes connections at its port", sent=False)
                )

        await asyncio.gather(*(probe(name, engine) for name, engine in engines.items()))

    def _engine(self, name: str) -> HttpEngine:
        engine = self._replicas.by_name[name].engine
        assert isinstance(engine, HttpEngine)
        return engine

    @property
    def _wanted(self) -> Mapping[str, str]:
        """The names of the engines that may serve, by URL."""
        return {state.url: name for name, state in self._replicas.snapshot.routable.items()}

    def _fell(self, reason: str) -> None:
        """Record that the router does not answer."""
        if self._down is None:
            self._down, self._listed = reason, frozenset()
            meanwhile = "requests go straight to the engines" if self._fallback else "requests wait for it"
            logger.warning("%s is down, %s: %s", self.router.name, meanwhile, reason)
            self._event_log.emit("router_down", self.router.name, reason=reason.partition("\n")[0])
        self._wake.set()

    async def _follow(self) -> None:
        """Check the router's list after every new snapshot, until cancelled."""
        while True:
            async with self._replicas.changed:
                await self._replicas.changed.wait()
            self._wake.set()

    async def _keep(self) -> None:
        """Keep the router running and its list current, until cancelled or the router is lost."""
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
                    logger.error("%s stays down: it was restarted %d times", self.router.name, attempts)
                    await self._notify()
                    return
                attempts, since = attempts + 1, await self._restart(attempts)
            try:
                await self._update_list()
            except LocalError as error:
                logger.warning("the list of %s could not be checked: %s", self.router.name, error)
            except EngineError as error:
                self._fell(str(error))
            await self._notify()
            await self._pause(LOOK_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Wait until the list should be checked: a wake-up, the end of the router's process, or the time limit."""
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

    async def _restart(self, attempt: int) -> float:
        """Restart the router after a delay. Return the time (time.monotonic) when that was done."""
        await asyncio.sleep(delay_before(attempt))
        await self._started.end()
        try:
            self._started = await self._start()
        except LaunchError as error:
            logger.error("%s did not come back: %s", self.router.name, error)
        return time.monotonic()

    async def _update_list(self) -> None:
        """Make the router's list equal to the engines that may serve. Raises EngineError if it does not answer."""
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
        """Add one engine to the router's list."""
        try:
            await self.router.register(self._engine(name), deadline=JOIN_DEADLINE)
            self._refused.pop(url, None)
        except EngineError as error:
            if url not in self._refused:
                logger.error("%s did not accept %s: %s", self.router.name, name, error)
            self._refused[url] = str(error)
            await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._joining.pop(url, None)
            self._wake.set()

    async def _leave(self) -> None:
        """Remove the engines from the list of a router that was not started here."""
        if self._started.process is None:
            for url in self._wanted:
                with suppress(EngineError):
                    await self.router.deregister(url)

    async def _notify(self) -> None:
        """Wake the requests that wait for the router."""
        async with self._changed:
            self._changed.notify_all()


class _NotSentError(Exception):
    """The router could not be reached, so no engine has the request."""
