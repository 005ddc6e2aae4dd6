"""Requests to the engines of a fleet, from the process that owns the fleet or from one that follows it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, overload

from millrace import arguments
from millrace.engines.base import Engine
from millrace.errors import ArgumentError, MillraceError, NoEngineError
from millrace.fleet.admission import Admission
from millrace.fleet.attempts import Attempts, generate_whole
from millrace.fleet.event_log import EventLog
from millrace.fleet.labels import Label
from millrace.fleet.many import Completion, as_completed, most_at_once, routed_samples
from millrace.fleet.replica_state import Snapshot
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import RoutingPolicy, admissible
from millrace.fleet.sending import Sender, Using, unadapted
from millrace.types import ANYWHERE, Capability, GenerateRequest, Generation, RoutingContext


class FleetClient(ABC):
    """Sends requests to the engines of a fleet. All methods belong to one event loop.

    `replicas`: this process's view of the engines. `event_log`: the event log of this process.
    """

    def __init__(self, replicas: ReplicaSet, event_log: EventLog, seed: int, using: Using = unadapted) -> None:
        self.event_log = event_log
        self.replicas = replicas
        self._router = RoutingPolicy(seed)
        self._admission = Admission(replicas, self._router, event_log)
        self._sender = Sender(replicas, self._admission, event_log, using)

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
        arguments.instance("request", request, GenerateRequest)
        arguments.instance("routing", routing, RoutingContext)
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
        arguments.instance("request", request, GenerateRequest)
        arguments.instance("routing", routing, RoutingContext)
        self._require_published()
        retries = arguments.count("retries", retries)
        attempts = Attempts(retries, self.event_log)
        sent = self._sender.stream(
            request, routing, deadline, attempts, interrupted=lambda: retries > 0 and self.asleep
        )
        async with aclosing(sent):
            async for made in sent:
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
        samples = routed_samples(requests, n, routing)

        async def run(sample: "tuple[Completion, RoutingContext]") -> Completion:
            completion, context = sample
            try:
                made = await self.generate(completion.request, deadline=deadline, routing=context, retries=retries)
            except ArgumentError:
                raise
            except MillraceError as error:
                return replace(completion, error=error)
            return replace(completion, generation=made)

        def most() -> int:
            return most_at_once(replica.info for replica in self.replicas.by_name.values())

        return as_completed(samples, run, most)

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
        return await self._sender.generate(request, routing, deadline)

    def _require_published(self) -> None:  # noqa: B027
        """Raises NoEngineError if no engine can serve before a publish. A fleet that publishes overrides this."""
