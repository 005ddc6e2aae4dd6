"""Requests to the engines of a fleet: the same from the process that owns it and from those that follow it."""

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from millrace import arguments
from millrace.engines.base import Engine
from millrace.errors import ArgumentError, EngineFailed, EngineUnreachable, NoEngineError
from millrace.fleet.event_log import EventLog
from millrace.fleet.replica_state import Snapshot
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import RoutingPolicy, admissible, with_lora
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext


class FleetClient:
    """All methods belong to one event loop. Requests in flight are counted here: those of this process."""

    def __init__(self, members: ReplicaSet, event_log: EventLog, seed: int) -> None:
        self.event_log = event_log
        self.members = members
        self._router = RoutingPolicy(seed)
        self._outstanding: Counter[str] = Counter()

    @property
    def snapshot(self) -> Snapshot:
        """How the engines stand now."""
        return self.members.snapshot

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together that every engine takes."""
        return min(replica.info.context_length for replica in self.members.replicas.values())

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {name: replica.engine for name, replica in self.members.replicas.items()}

    @property
    def outstanding(self) -> Mapping[str, int]:
        """Of each engine: tokens of the requests that it has from here, prompts and room for output."""
        return {name: self._outstanding[name] for name in self.members.replicas}

    @property
    def asleep(self) -> bool:
        """Whether some of the engines' memory is released, so that they generate nothing."""
        return bool(self.members.asleep)

    async def awake(self) -> None:
        """Waits until the fleet is woken, for as long as that takes."""
        self._require_open()
        async with self.members.changed:
            await self.members.changed.wait_for(lambda: not self.members.asleep)

    @property
    def interrupted(self) -> bool:
        """Whether no engine generates for a while: all sleep, or the last one is being started again."""
        return self.asleep or (bool(self.members.coming) and not self.snapshot.routable)

    async def resumed(self) -> None:
        """Waits until the fleet is no longer interrupted, for as long as that takes."""
        self._require_open()
        async with self.members.changed:
            await self.members.changed.wait_for(lambda: not self.interrupted)

    async def serving(self, *, deadline: float) -> None:
        """Waits until some engine takes requests. Raises NoEngineError as `generate` does."""
        self._require_open(deadline)
        await self.members.until(lambda: bool(self.snapshot.routable), deadline)

    async def generate(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE
    ) -> Generation:
        """Sends the request to the engine that suits it best (docs/routing.md), and waits for one where all sleep, are
        being updated or started anew, or have none of the versions that `routing` admits.

        Raises NoEngineError when none may serve it by the deadline or none is left, and the engine's own EngineError
        otherwise; a request that failed on an engine is not sent again by this method. `deadline` is in seconds; 0
        or less has passed. Raises ArgumentError for arguments of the wrong type.
        """
        self._require_open(deadline)
        for name, value, kind in (("request", request, GenerateRequest), ("routing", routing, RoutingContext)):
            if not isinstance(value, kind):
                raise ArgumentError(f"{name} must be a {kind.__name__}, and is {arguments.shown(value)}")
        return await self._generate(request, routing, deadline)

    def _require_open(self, deadline: float = 0.0) -> None:
        """Raises NoEngineError where the fleet is closed, and ArgumentError for a deadline that is not a number."""
        if self.members.closed:
            raise NoEngineError.closed()
        arguments.real("deadline", deadline)

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """By whichever way; this is the one that there always is."""
        return await self._straight(request, routing, deadline)

    async def _straight(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """To the engine that is chosen here."""
        end = time.monotonic() + deadline
        with self.event_log.waiting():
            name = await self._route(request, routing, deadline)
        member, own = self.snapshot.get(name), "lora_path" in request.extra
        lora = None if own else member.lora
        if lora is not None:
            request = replace(request, extra={**request.extra, "lora_path": lora})
        tokens = len(request.input_ids) + request.sampling.max_new_tokens
        self._outstanding[name] += tokens
        try:
            with self.event_log.request(name) as asked, self._using(name, lora, request.request_id):
                left = end - time.monotonic()
                made = asked.made = await self.members.replicas[name].engine.generate(request, deadline=left)
            await self.members.answered(name)
            return made if lora is None else with_lora(made, member.version)
        except (EngineUnreachable, EngineFailed) as error:
            await self.members.suspect(name, error)
            raise
        finally:
            self._outstanding[name] -= tokens
            if not self._outstanding[name]:
                await self.members.notify()

    async def _route(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> str:
        wanted = routing.describe()
        await self.members.until(lambda: bool(admissible(self.snapshot, routing)), deadline, wanted)
        choice = self._router.choose(self.snapshot, self._outstanding, request, routing)
        assert choice is not None
        self.event_log.routed(choice.why)
        return choice.engine

    def _using(self, engine: str, lora: str | None, request_id: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """What has to be kept for the request as long as it runs."""
        return nullcontext()
