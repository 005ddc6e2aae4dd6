"""Requests to the engines of a fleet, from the process that owns the fleet or from one that follows it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, overload

from millrace import arguments
from millrace.continuation import call_id, generate_in_parts
from millrace.engines.base import Engine
from millrace.errors import ArgumentError, EngineFailed, EngineUnreachable, MillraceError, NoEngineError
from millrace.fleet.admission import Admission
from millrace.fleet.attempts import Attempts, generate_whole, stream_whole
from millrace.fleet.event_log import Asked, EventLog
from millrace.fleet.labels import Label
from millrace.fleet.many import Completion, as_completed, samples_of
from millrace.fleet.replica_state import Phase, ReplicaState, Snapshot
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import RoutingPolicy, admissible, with_lora
from millrace.types import ANYWHERE, Capability, FinishReason, GenerateRequest, Generation, RoutingContext

ASSUMED_RUNNING = 256  # requests that an engine runs at once if it does not say


class FleetClient(ABC):
    """Sends requests to the engines of a fleet. All methods belong to one event loop.

    `replicas`: this process's view of the engines. `event_log`: the event log of this process.
    """

    def __init__(self, replicas: ReplicaSet, event_log: EventLog, seed: int) -> None:
        self.event_log = event_log
        self.replicas = replicas
        self._router = RoutingPolicy(seed)
        self._admission = Admission(replicas, self._router, event_log)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.replicas.counts()}>"

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
        return min(info.context_length for info in self.replicas.infos)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What every engine can do."""
        return frozenset.intersection(*(info.capabilities for info in self.replicas.infos))

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines' clients, by name."""
        return {name: replica.engine for name, replica in self.replicas.by_name.items()}

    @property
    def outstanding(self) -> Mapping[str, int]:
        """The tokens of this process's running requests (prompts, and room for output), by engine."""
        return {name: self._admission.outstanding[name] for name in self.replicas.by_name}

    @property
    def waiting(self) -> int:
        """The requests of this process that wait for room on an engine."""
        return self._admission.waiting

    @property
    def headroom(self) -> Mapping[str, int | None]:
        """By engine, the tokens of its KV cache that stay free at the fullest moment of its requests (docs/routing.md).

        None if the engine does not report the size of its cache.
        """
        return {name: self._admission.headroom(name) for name in self.replicas.by_name}

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
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE, retries: int = 0
    ) -> Generation:
        """Send the request to the engine that suits it best, and return its generation.

        docs/routing.md describes how the engine is chosen. If no engine may serve the request, this method waits for
        one: while all engines sleep, are updated or restarted, or have no version that `routing` admits.

        With `retries`, a request whose engine fails or aborts it continues on an engine with the tokens that it has.
        Each failure costs a retry. An abort by `sleep(interrupt=True)` costs none: the request continues when the fleet
        is awake. A request whose engine leaves the fleet continues on another one, also without retries. To end a
        request, cancel the call.

        Args:
            request: The prompt as token ids, and how to sample.
            deadline: Seconds for everything, the wait for an engine included. A deadline of 0 or less has passed.
            routing: The request's session, its group, and the weight versions that it accepts.
            retries: How many failures and aborts the request survives.

        Raises:
            NoEngineError: No engine may serve the request by the deadline, no engine is left, or the fleet is closed.
            EngineError: The engine's own error, if the request failed there and no retry was left.
            ArgumentError: An argument has the wrong type.

        Example:

            request = GenerateRequest(input_ids, SamplingParams(max_new_tokens=64))
            routing = RoutingContext(session="episode-7")
            generation = await fleet.generate(request, deadline=60.0, routing=routing, retries=2)
        """
        self._require_open(deadline)
        _require(request, routing)
        attempts = Attempts(arguments.count("retries", retries), self.event_log)
        if not retries:
            return await self._generate(request, routing, deadline)
        end = time.monotonic() + deadline

        async def send(rest: GenerateRequest) -> Generation:
            return await self._generate(rest, routing, end - time.monotonic())

        return await generate_whole(request, send, attempts, interrupted=lambda: self.asleep)

    async def stream(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE, retries: int = 0
    ) -> AsyncGenerator[Generation, None]:
        """Like `generate`, but yields the cumulative output as it grows.

        Only the last item is final. The `finish_reason` of every item before it is ABORT. Closing the generator aborts
        the request. Streams go straight to an engine, also if the fleet has an external router.

        Args and errors are those of `generate`.

        Example:

            async for generation in fleet.stream(request, deadline=60.0):
                print(tokenizer.decode(generation.output_ids))
        """
        self._require_open(deadline)
        _require(request, routing)
        self._require_published()
        retries, end = arguments.count("retries", retries), time.monotonic() + deadline
        attempts = Attempts(retries, self.event_log)
        leaves = False  # the engine that aborted the request leaves the fleet

        async def opened(rest: GenerateRequest) -> AsyncGenerator[Generation, None]:
            nonlocal leaves
            leaves = False
            async with (
                self._placed(rest, routing, end - time.monotonic()) as placed,
                aclosing(placed.engine.stream(placed.request, deadline=placed.left)) as stream,
            ):
                async for made in stream:
                    placed.asked.made = made
                    yield placed.renamed(made)
            leaves = await self._moves(placed)

        parts = stream_whole(request, opened, attempts, interrupted=lambda: leaves or (retries > 0 and self.asleep))
        async with aclosing(parts):
            async for made in parts:
                yield made

    def generate_many(
        self,
        requests: Iterable[GenerateRequest],
        *,
        n: int = 1,
        deadline: float,
        routing: RoutingContext | Callable[[GenerateRequest], RoutingContext] = ANYWHERE,
        retries: int = 0,
    ) -> AsyncGenerator[Completion, None]:
        """Send many requests, and yield a `Completion` for each sample in the order in which they end.

        A request that fails does not end the others: its Completion has the error. Closing the generator aborts the
        requests that still run. `requests` may be a generator of any length. It is read in the event loop, and only as
        fast as completions are taken: at most twice as many requests are under way as the engines run at once.

        With n > 1, the samples of a request have the ids ID-0, ID-1 and so on, and share a routing group
        (docs/routing.md). If the request has a seed, sample 0 keeps it and each other sample gets one that is derived
        from it.

        Args:
            requests: The requests. Their ids must differ.
            n: The number of samples of each request.
            deadline: Seconds for each sample, from when it is sent.
            routing: For all requests, or a function that returns it for a request.
            retries: How many failures and aborts each sample survives, as in `generate`.

        Raises:
            NoEngineError: The fleet is closed.
            ArgumentError: An argument or an item of `requests` has the wrong type.
            Exception: What reading `requests` raises. The requests that still run are aborted.

        Example:

            async for completion in fleet.generate_many(requests, n=8, deadline=300.0, retries=2):
                if completion.error is None:
                    rewards[completion.index].append(score(completion.generation.output_ids))
        """
        self._require_open(deadline)
        n, retries = arguments.count("n", n, least=1), arguments.count("retries", retries)
        if not isinstance(routing, RoutingContext) and not callable(routing):
            raise ArgumentError(f"routing must be a RoutingContext or a function, and is {arguments.shown(routing)}")
        samples = _samples(requests, n, routing)

        async def run(sample: "tuple[Completion, RoutingContext]") -> Completion:
            completion, context = sample
            try:
                made = await self.generate(completion.request, deadline=deadline, routing=context, retries=retries)
            except ArgumentError:
                raise
            except MillraceError as error:
                return replace(completion, error=error)
            return replace(completion, generation=made)

        return as_completed(samples, run, self._most_at_once)

    @overload
    async def generate_all(
        self,
        requests: Iterable[GenerateRequest],
        *,
        n: int = 1,
        deadline: float,
        routing: RoutingContext | Callable[[GenerateRequest], RoutingContext] = ANYWHERE,
        retries: int = 0,
        return_exceptions: Literal[False] = False,
    ) -> list[Generation]: ...

    @overload
    async def generate_all(
        self,
        requests: Iterable[GenerateRequest],
        *,
        n: int = 1,
        deadline: float,
        routing: RoutingContext | Callable[[GenerateRequest], RoutingContext] = ANYWHERE,
        retries: int = 0,
        return_exceptions: bool,
    ) -> list[Generation | MillraceError]: ...

    async def generate_all(
        self,
        requests: Iterable[GenerateRequest],
        *,
        n: int = 1,
        deadline: float,
        routing: RoutingContext | Callable[[GenerateRequest], RoutingContext] = ANYWHERE,
        retries: int = 0,
        return_exceptions: bool = False,
    ) -> list[Generation] | list[Generation | MillraceError]:
        """Send many requests, and return the generations of all samples, in the order of the requests.

        The n samples of a request follow each other: sample s of request i is item i * n + s. The first request that
        fails aborts the others, and its error is raised. With `return_exceptions`, all others complete, and the errors
        are items of the list.

        Args and errors are those of `generate_many`.

        Example:

            generations = await fleet.generate_all(requests, n=8, deadline=300.0, retries=2)
        """
        found: dict[tuple[int, int], Generation | MillraceError] = {}
        completions = self.generate_many(requests, n=n, deadline=deadline, routing=routing, retries=retries)
        async with aclosing(completions):
            async for one in completions:
                failed = one.error is not None and return_exceptions
                found[one.index, one.sample] = one.error if one.error and failed else one.result()
        return [found[place] for place in sorted(found)]

    def _require_open(self, deadline: float = 0.0) -> None:
        """Raises NoEngineError if the fleet is closed, and ArgumentError if the deadline is not a number."""
        if self.replicas.closed:
            raise NoEngineError.closed()
        arguments.real("deadline", deadline)

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """Send the request to an engine. A fleet with an external router overrides this."""
        return await self._send_direct(request, routing, deadline)

    async def _send_direct(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        """Send the request to the engine that the routing policy chooses. It moves to another if this one leaves."""
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

    async def _moves(self, placed: "_Placed") -> bool:
        """Return whether the request was aborted because its engine leaves, so that it continues on another one."""
        made = placed.asked.made
        if made is None or made.finish_reason is not FinishReason.ABORT or not await self._leaves(placed.engine.name):
            return False
        return bool(self.snapshot.usable or self.replicas.coming or self.replicas.elastic)

    async def _leaves(self, engine: str) -> bool:
        """Return whether the engine leaves the fleet, or has left it."""
        return not self.snapshot.has(engine) or self.snapshot.get(engine).phase is Phase.DRAINING

    @asynccontextmanager
    async def _placed(
        self, request: GenerateRequest, routing: RoutingContext, deadline: float
    ) -> "AsyncIterator[_Placed]":
        """Choose an engine for the request. In the block, the request counts as running there."""
        started = time.monotonic()
        with self.event_log.waiting():
            place = await self._admission.enter(request, routing, deadline)
        queued = time.monotonic() - started
        name, asked = place.engine, Asked(place.engine)
        state, own = self.snapshot.get(name), "lora_path" in request.extra
        lora = None if own else state.lora
        if lora is not None:
            request = replace(request, extra={**request.extra, "lora_path": lora})
        try:
            with self.event_log.request(name) as asked, self._using(name, lora, request.request_id):
                engine = self.replicas.by_name[name].engine
                yield _Placed(engine, request, started + deadline, asked, None if lora is None else state, queued)
            await self.replicas.answered(name)
        except (EngineUnreachable, EngineFailed) as error:
            await self.replicas.suspect(name, error)
            raise
        finally:
            self._admission.leave(place, asked.made)
            if not self._admission.outstanding[name]:
                await self.replicas.notify()

    def _most_at_once(self) -> int:
        """Return how many requests of `generate_many` run or wait: twice as many as the engines run at once."""
        running = [replica.info.max_running or ASSUMED_RUNNING for replica in self.replicas.by_name.values()]
        return 2 * max(sum(running), 1)

    def _require_published(self) -> None:  # noqa: B027
        """Raises NoEngineError if no engine can serve before a publish. A fleet that publishes overrides this."""

    def _using(self, engine: str, lora: str | None, request_id: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context that is open while the request runs on the engine."""
        return nullcontext()


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


def _samples(
    requests: Iterable[GenerateRequest],
    n: int,
    routing: RoutingContext | Callable[[GenerateRequest], RoutingContext],
) -> Iterator[tuple[Completion, RoutingContext]]:
    """Yield the samples to generate, as completions without a result, and how each is routed."""
    for index, request in enumerate(requests):
        _require(request, ANYWHERE)
        context = routing if isinstance(routing, RoutingContext) else routing(request)
        _require(request, context)
        if n > 1 and context.group is None:
            context = replace(context, group=request.request_id)
        for sample, one in enumerate(samples_of(request, n)):
            yield Completion(index, sample, one), context


def _require(request: object, routing: object) -> None:
    """Raises ArgumentError if the arguments have the wrong types."""
    for name, value, kind in (("request", request, GenerateRequest), ("routing", routing, RoutingContext)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} must be a {kind.__name__}, and is {arguments.shown(value)}")
