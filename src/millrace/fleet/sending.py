"""Sends requests straight to engines. A request moves to another engine if its own leaves the fleet."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

from millrace.continuation import call_id, generate_in_parts
from millrace.engines.base import Engine
from millrace.errors import EngineFailed, EngineUnreachable
from millrace.fleet.admission import Admission
from millrace.fleet.attempts import Attempts, stream_whole
from millrace.fleet.event_log import Asked, EventLog
from millrace.fleet.replica_state import ReplicaState
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import with_lora
from millrace.types import FinishReason, GenerateRequest, Generation, RoutingContext

# Returns a context that is open while a request runs, of the engine's name, the published adapter's, and the request's
# id.
Using = Callable[[str, str | None, str], AbstractContextManager[None]]


def unadapted(engine: str, lora: str | None, request_id: str) -> AbstractContextManager[None]:  # noqa: ARG001
    """The `Using` of a process that loads no adapters."""
    return nullcontext()


class Sender:
    """Sends each request to the engine that admission chooses, and records how it went.

    using: keeps the adapter of a request loaded.
    """

    def __init__(self, replicas: ReplicaSet, admission: Admission, event_log: EventLog, using: Using) -> None:
        self._replicas, self._admission, self._event_log, self._using = replicas, admission, event_log, using

    async def generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """Send the request, and return its generation. Raises what the engine raises."""
        end, sent, moves = time.monotonic() + deadline, 0, False

        async def call(rest: GenerateRequest) -> Generation:
            nonlocal sent, moves
            if sent:
                rest = replace(rest, request_id=call_id(request.request_id, sent))
            sent += 1
            async with self._placed(rest, routing, end - time.monotonic()) as placed:
                placed.asked.made = await placed.engine.generate(placed.request, deadline=placed.left)
            moves = await self._moves(placed)
            return placed.renamed(placed.asked.made)

        return await generate_in_parts(request, call, goes_on=lambda: moves)

    def stream(
        self,
        request: GenerateRequest,
        routing: RoutingContext,
        deadline: float,
        attempts: Attempts,
        *,
        interrupted: Callable[[], bool],
    ) -> AsyncGenerator[Generation, None]:
        """Stream the cumulative output. The request continues as in `stream_whole`, and if its engine leaves."""
        end, moves = time.monotonic() + deadline, False

        async def opened(rest: GenerateRequest) -> AsyncGenerator[Generation, None]:
            nonlocal moves
            moves = False
            async with (
                self._placed(rest, routing, end - time.monotonic()) as placed,
                aclosing(placed.engine.stream(placed.request, deadline=placed.left)) as stream,
            ):
                async for made in stream:
                    placed.asked.made = made
                    yield placed.renamed(made)
            moves = await self._moves(placed)

        return stream_whole(request, opened, attempts, interrupted=lambda: moves or interrupted())

    async def _moves(self, placed: "_Placed") -> bool:
        """Return whether the request was aborted because its engine leaves, so that it continues on another one."""
        made, replicas = placed.asked.made, self._replicas
        if (
            made is None
            or made.finish_reason is not FinishReason.ABORT
            or not await replicas.leaves(placed.engine.name)
        ):
            return False
        return bool(replicas.snapshot.usable or replicas.coming or replicas.elastic)

    @asynccontextmanager
    async def _placed(
        self, request: GenerateRequest, routing: RoutingContext, deadline: float
    ) -> "AsyncIterator[_Placed]":
        """Choose an engine for the request. In the block, the request counts as running there."""
        started = time.monotonic()
        with self._event_log.waiting():
            place = await self._admission.enter(request, routing, deadline)
        queued = time.monotonic() - started
        name, asked = place.engine, Asked(place.engine)
        state, own = self._replicas.snapshot.get(name), "lora_path" in request.extra
        lora = None if own else state.lora
        if lora is not None:
            request = replace(request, extra={**request.extra, "lora_path": lora})
        try:
            with self._event_log.request(name) as asked, self._using(name, lora, request.request_id):
                engine = self._replicas.by_name[name].engine
                yield _Placed(engine, request, started + deadline, asked, None if lora is None else state, queued)
            await self._replicas.answered(name)
        except (EngineUnreachable, EngineFailed) as error:
            await self._replicas.suspect(name, error)
            raise
        finally:
            self._admission.leave(place, asked.made)
            if not self._admission.outstanding[name]:
                await self._replicas.notify()


@dataclass(slots=True)
class _Placed:
    """A request on the engine that was chosen for it.

    end: its deadline (time.monotonic). asked: where its result is recorded. adapted: the engine's state, if it serves
    the request with a published LoRA adapter. queued: the seconds that it waited for the engine.
    """

    engine: Engine
    request: GenerateRequest
    end: float
    asked: Asked
    adapted: ReplicaState | None
    queued: float

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.end - time.monotonic()

    def renamed(self, made: Generation) -> Generation:
        """Return the generation with its wait, and with the version of the adapter that made it."""
        made = replace(made, queue_seconds=self.queued)
        return made if self.adapted is None else with_lora(made, self.adapted.version)
