"""The requests that the checks send, and helpers that act while a generation runs."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from millrace.conformance.check import CheckFailed, Lacking, Subject, expect
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams

GENERATE_DEADLINE = 30.0  # seconds; the generations take less than two on a loaded CPU
NOTHING_SECONDS = 0.2  # how long a request that must wait is observed
IDLE_DEADLINE = 10.0
POLL_SECONDS = 0.02
LONG_TOKENS = 1000  # tokens of the first attempt; enough to act during the generation on a GPU
MARGIN = 24  # tokens of the context that a long generation leaves free
ATTEMPTS = 8
DOUBLINGS = 4  # maximum number of times that attempts double the tokens
CLOSE = 0.02  # maximum difference between logprobs of the same weights, in nats


def prompt(subject: Subject, label: str, length: int) -> tuple[int, ...]:
    """Return a prompt of `length` random tokens, which is always the same for the same label.

    The tokens are from the middle of the vocabulary, where models have no special tokens.
    """
    draw = random.Random(label)  # noqa: S311 (no secret)
    size = subject.info.vocab_size
    return tuple(draw.randrange(size // 4, size // 2) for _ in range(length))


def ask(
    subject: Subject, label: str, *, length: int = 8, tokens: int = 8, sampling: SamplingParams | None = None
) -> GenerateRequest:
    """Return a request with a unique id, for `tokens` greedy tokens or with the given `sampling`."""
    greedy = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(
        prompt(subject, label, length), sampling or greedy, request_id=f"{label}-{secrets.token_hex(4)}"
    )


def ask_long(subject: Subject, label: str, attempt: int = 0) -> GenerateRequest:
    """Return a request for many tokens. Each attempt doubles the number, as far as the context has room."""
    length = 8
    room = subject.info.context_length - length - MARGIN
    return ask(subject, label, length=length, tokens=min(LONG_TOKENS << min(attempt, DOUBLINGS), room))


async def generate(subject: Subject, request: GenerateRequest) -> Generation:
    """Return the generation of a request. Raises CheckFailed unless it is complete."""
    made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    require_whole(request, made)
    return made


def require_whole(request: GenerateRequest, made: Generation) -> None:
    """Raise CheckFailed unless the generation has all requested tokens, each with its logprob and version span."""
    asked = request.sampling.max_new_tokens
    expect(made.finish_reason is FinishReason.LENGTH, f"the finish reason is {made.finish_reason}, not length")
    expect(len(made.output_ids) == asked, f"{len(made.output_ids)} tokens were returned, {asked} were requested")
    require_sound(request, made)


def require_sound(request: GenerateRequest, made: Generation) -> None:
    """Raise CheckFailed unless the generation is consistent, which an aborted one must be, too."""
    expect(made.request_id == request.request_id, f"{request.request_id} was answered as {made.request_id}")
    count = len(made.output_ids)
    expect(len(made.logprobs) == count, f"{count} tokens have {len(made.logprobs)} logprobs")
    end = 0
    for span in made.version_spans:
        expect(span.start == end < span.end, f"the version spans {made.version_spans} have a gap or an empty span")
        end = span.end
    expect(end == count, f"the version spans end at {end}, the tokens at {count}")


@dataclass(slots=True)
class Flight:
    """A running generation.

    task: the generation, whose result is the complete output.
    first: the first partial output.
    so_far: the latest partial output.
    grown: set when new output arrives.
    """

    request: GenerateRequest
    task: asyncio.Task[Generation]
    first: Generation | None = None
    so_far: Generation | None = None
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def length(self) -> int:
        """The number of tokens so far."""
        return len(self.so_far.output_ids) if self.so_far else 0


def require_cut_off(flight: Flight, made: Generation) -> None:
    """Raise CheckFailed unless the generation was aborted and keeps the tokens that were seen before."""
    expect(made.finish_reason is FinishReason.ABORT, f"the finish reason is {made.finish_reason}, not abort")
    require_sound(flight.request, made)
    seen = flight.first.output_ids if flight.first else ()
    expect(made.output_ids[: len(seen)] == seen != (), "the aborted request lost tokens that it had")


async def until_grown(flight: Flight) -> None:
    """Wait until new output arrives or the generation has ended."""
    flight.grown.clear()
    grown = asyncio.create_task(flight.grown.wait())
    await asyncio.wait([grown, flight.task], return_when=asyncio.FIRST_COMPLETED)
    grown.cancel()


@asynccontextmanager
async def in_flight(subject: Subject, requests: list[GenerateRequest]) -> AsyncIterator[list[Flight]]:
    """Start generations together, and yield them once each has its first token. Those still running at the end are
    cancelled."""
    flights = [_start(subject, request) for request in requests]
    try:
        await asyncio.gather(*map(until_grown, flights))
        yield flights
    finally:
        for flight in flights:
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)


def _start(subject: Subject, request: GenerateRequest) -> Flight:
    async def follow() -> Generation:
        async for made in subject.engine.stream(request, deadline=GENERATE_DEADLINE):
            flight.first = flight.first or made
            flight.so_far = made
            flight.grown.set()
        if flight.so_far is None:
            raise CheckFailed("the stream was empty")
        return flight.so_far

    flight = Flight(request, asyncio.create_task(follow()))
    return flight


async def catch(
    subject: Subject,
    label: str,
    look: Callable[[Flight], Awaitable[bool]],
    change: Callable[[GenerateRequest], GenerateRequest] = lambda request: request,
) -> None:
    """Call `look` with one long generation in flight, as `catch_together` does. `change` adapts its request."""

    def make(attempt: int) -> list[GenerateRequest]:
        return [change(ask_long(subject, f"{label}-{attempt}", attempt))]

    await catch_together(subject, make, lambda flights: look(flights[0]))


async def catch_together(
    subject: Subject,
    make: Callable[[int], list[GenerateRequest]],
    look: Callable[[list[Flight]], Awaitable[bool]],
) -> None:
    """Call `look` with generations in flight, and retry with longer ones if it returns False because they ended too
    soon.

    `make` returns the requests of an attempt by its number (see `ask_long`). Raises Lacking if the generations of all
    attempts end too soon.
    """
    for attempt in range(ATTEMPTS):
        requests = make(attempt)
        async with in_flight(subject, requests) as flights:
            if await look(flights):
                return
    longest = max(request.sampling.max_new_tokens for request in requests)
    raise Lacking(
        f"generations of {longest} tokens end too soon to act during them; the context has room for "
        f"{subject.info.context_length}"
    )


async def require_waiting(task: asyncio.Task[Generation]) -> None:
    """Observe a request for a moment. Raises CheckFailed if it is answered."""
    await asyncio.wait([task], timeout=NOTHING_SECONDS)
    expect(not task.done(), "a request was answered although it had to wait")


async def until_idle(subject: Subject) -> None:
    """Wait until the engine is idle. Raises CheckFailed if it still has requests after IDLE_DEADLINE seconds."""
    end = time.monotonic() + IDLE_DEADLINE
    while True:
        load = await subject.engine.loads()
        if not load.running_requests and not load.waiting_requests:
            return
        expect(
            time.monotonic() < end,
            f"{load.running_requests} requests still run and {load.waiting_requests} wait after {IDLE_DEADLINE:.0f} s",
        )
        await asyncio.sleep(POLL_SECONDS)


async def require_ended(subject: Subject, flight: Flight) -> None:
    """Raise CheckFailed unless the server has finished the generation. Its last tokens may still be in transit."""
    running = (await subject.engine.loads()).running_requests
    expect(not running, f"{running} requests still run")
    await asyncio.wait([flight.task], timeout=IDLE_DEADLINE)
    expect(flight.task.done(), "the server is idle, but a request was not answered")
    require_whole(flight.request, await flight.task)


async def fingerprint(subject: Subject) -> Generation:
    """Return the greedy generation of a fixed prompt with an empty prefix cache. It identifies the weights."""
    await subject.engine.flush_cache()
    return await generate(subject, ask(subject, "fingerprint", length=12, tokens=12))


def alike(one: Generation, two: Generation) -> bool:
    """Return whether two greedy generations come from the same weights."""
    return one.output_ids == two.output_ids and bool(abs(one.logprobs - two.logprobs).max() < CLOSE)
