"""Requests to the engines of a fleet, from the process that owns the fleet or from one that follows it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType

from millrace import arguments
from millrace.engines.base import Engine
from millrace.errors import ArgumentError, EngineFailed, EngineUnreachable, NoEngineError
from millrace.fleet.event_log import EventLog
from millrace.fleet.labels import Label
from millrace.fleet.replica_state import Snapshot
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import RoutingPolicy, admissible, with_lora
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext


class FleetClient(ABC):
    """Sends requests to the engines of a fleet. All methods belong to one event loop.

    `replicas`: this process's view of the engines. `event_log`: the event log of this process.
    """

    def __init__(self, replicas: ReplicaSet, event_log: EventLog, seed: int) -> None:
        self.event_log = event_log
        self.replicas = replicas
        self._router = RoutingPolicy(seed)
        self._outstanding: Counter[str] = Counter()

    @property
    def snapshot(self) -> Snapshot:
        """The states of all engines now."""
        return self.replicas.snapshot

    @property
    @abstractmethod
    def version(self) -> int | None:
        """The number of the last published version: that of the model's folder before the first publish."""

    @property
    def labels(self) -> Mapping[int, Label]:
        """The trainer's own names for the last published versions, by version. Versions without one are missing.

        A generation's spans have versions, so this finds the trainer's steps that made its tokens:

            steps = {fleet.labels.get(span.version) for span in generation.version_spans}
        """
        return MappingProxyType(self.replicas.labels)

    @property
    def context_length(self) -> int:
        """The tokens of prompt and output together that a request may have on every engine."""
        return min(replica.info.context_length for replica in self.replicas.by_name.values())

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines' clients, by name."""
        return {name: replica.engine for name, replica in self.replicas.by_name.items()}

    @property
    def outstanding(self) -> Mapping[str, int]:
        """The tokens of this process's running requests (prompts, and room for output), by engine."""
        return {name: self._outstanding[name] for name in self.replicas.by_name}

    @property
    def asleep(self) -> bool:
        """Whether memory of the engines is released, so that they do not generate."""
        return bool(self.replicas.asleep)

    async def awake(self, *, deadline: float | None = None) -> None:
        """Wait until the fleet is awake. Raises TimeoutError after `deadline` seconds; None waits without a limit."""
        await self._until_sleeping(False, deadline)

    async def slept(self, *, deadline: float | None = None) -> None:
        """Wait until the fleet sleeps. Raises TimeoutError after `deadline` seconds; None waits without a limit."""
        await self._until_sleeping(True, deadline)

    async def _until_sleeping(self, sleeping: bool, deadline: float | None) -> None:
        self._require_open(0.0 if deadline is None else deadline)
        try:
            async with asyncio.timeout(deadline), self.replicas.changed:
                await self.replicas.changed.wait_for(lambda: self.asleep is sleeping)
        except TimeoutError:
            state = "asleep" if sleeping else "awake"
            raise TimeoutError(f"the fleet was not {state} within {deadline} s: {self.snapshot.describe()}") from None

    @property
    def interrupted(self) -> bool:
        """Whether generation is interrupted: all engines sleep, or the last one is being restarted."""
        return self.asleep or (bool(self.replicas.coming) and not self.snapshot.routable)

    async def resumed(self) -> None:
        """Wait until generation is no longer interrupted, without a deadline."""
        self._require_open()
        async with self.replicas.changed:
            await self.replicas.changed.wait_for(lambda: not self.interrupted)

    async def serving(self, *, deadline: float) -> None:
        """Wait up to `deadline` seconds until an engine takes requests. Raises NoEngineError if none does."""
        self._require_open(deadline)
        await self.replicas.until(lambda: bool(self.snapshot.routable), deadline)

    async def reached(self, version: int, *, deadline: float) -> None:
        """Wait until an engine serves `version` or a later one.

        Raises NoEngineError if none does within `deadline` seconds, or if no engine is left.
        """
        self._require_open(deadline)
        wanted = RoutingContext(min_version=version)
        await self.replicas.until(lambda: bool(admissible(self.snapshot, wanted)), deadline, wanted.describe())

    async def generate(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE
    ) -> Generation:
        """Send the request to the engine that suits it best, and return its generation.

        docs/routing.md describes how the engine is chosen. If no engine may serve the request, this method waits for
        one: while all engines sleep, are updated or restarted, or have no version that `routing` admits. A request that
        failed on an engine is not sent again.

        Args:
            request: The prompt as token ids, and how to sample.
            deadline: Seconds for everything, the wait for an engine included. A deadline of 0 or less has passed.
            routing: The request's session, its group, and the weight versions that it accepts.

        Raises:
            NoEngineError: No engine may serve the request by the deadline, no engine is left, or the fleet is closed.
            EngineError: The engine's own error, if the request failed there.
            ArgumentError: An argument has the wrong type.

        Example:

            request = GenerateRequest("turn-1", input_ids, SamplingParams(max_new_tokens=64))
            generation = await fleet.generate(request, deadline=60.0, routing=RoutingContext(session="episode-7"))
        """
        self._require_open(deadline)
        for name, value, kind in (("request", request, GenerateRequest), ("routing", routing, RoutingContext)):
            if not isinstance(value, kind):
                raise ArgumentError(f"{name} must be a {kind.__name__}, and is {arguments.shown(value)}")
        return await self._generate(request, routing, deadline)

    def _require_open(self, deadline: float = 0.0) -> None:
        """Raises NoEngineError if the fleet is closed, and ArgumentError if the deadline is not a number."""
        if self.replicas.closed:
            raise NoEngineError.closed()
        arguments.real("deadline", deadline)

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """Send the request to an engine. A fleet with an external router overrides this."""
        return await self._send_direct(request, routing, deadline)

    async def _send_direct(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """Send the request to the engine that the routing policy chooses."""
        end = time.monotonic() + deadline
        with self.event_log.waiting():
            name = await self._route(request, routing, deadline)
        state, own = self.snapshot.get(name), "lora_path" in request.extra
        lora = None if own else state.lora
        if lora is not None:
            request = replace(request, extra={**request.extra, "lora_path": lora})
        tokens = len(request.input_ids) + request.sampling.max_new_tokens
        self._outstanding[name] += tokens
        try:
            with self.event_log.request(name) as asked, self._using(name, lora, request.request_id):
                left = end - time.monotonic()
                made = asked.made = await self.replicas.by_name[name].engine.generate(request, deadline=left)
            await self.replicas.answered(name)
            return made if lora is None else with_lora(made, state.version)
        except (EngineUnreachable, EngineFailed) as error:
            await self.replicas.suspect(name, error)
            raise
        finally:
            self._outstanding[name] -= tokens
            if not self._outstanding[name]:
                await self.replicas.notify()

    async def _route(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> str:
        """Wait for an engine that may serve the request, and return the name of the chosen one."""
        wanted = routing.describe()
        await self.replicas.until(lambda: bool(admissible(self.snapshot, routing)), deadline, wanted)
        choice = self._router.choose(self.snapshot, self._outstanding, request, routing)
        assert choice is not None
        self.event_log.routed(choice.why)
        return choice.engine

    def _using(self, engine: str, lora: str | None, request_id: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context that is open while the request runs on the engine."""
        return nullcontext()
