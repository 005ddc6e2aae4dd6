"""What the checks ask an engine to generate, and how they catch it while it does."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from millrace.conformance.check import CheckFailed, Lacking, Subject, expect
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams

GENERATE_DEADLINE = 30.0  # seconds; what is asked takes less than two on a loaded CPU
NOTHING_SECONDS = 0.2  # for so long a request that has to wait is watched
IDLE_DEADLINE = 10.0
POLL_SECONDS = 0.02
LONG_TOKENS = 1000  # of the first attempt; long enough to be caught in the middle on a GPU
MARGIN = 24  # tokens of the context that a long generation leaves free
ATTEMPTS = 8
DOUBLINGS = 4  # of the tokens, at most, from one attempt to the next
CLOSE = 0.02  # how far apart, in nats, the logprobs of the same weights may lie


def prompt(subject: Subject, label: str, length: int) -> tuple[int, ...]:
    """The same tokens for the same label. From the middle of the vocabulary, where no model keeps its special ones."""
    draw = random.Random(label)  # noqa: S311 (no secret)
    size = subject.info.vocab_size
    return tuple(draw.randrange(size // 4, size // 2) for _ in range(length))


def ask(
    subject: Subject, label: str, *, length: int = 8, tokens: int = 8, sampling: SamplingParams | None = None
) -> GenerateRequest:
    """A request for `tokens` greedy tokens, or as `sampling` says, under a name that was never used before."""
    greedy = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(f"{label}-{secrets.token_hex(4)}", prompt(subject, label, length), sampling or greedy)


def ask_long(subject: Subject, label: str, attempt: int = 0) -> GenerateRequest:
    """A request for many tokens: twice as many with each attempt, as long as the context has room."""
    length = 8
    room = subject.info.context_length - length - MARGIN
    return ask(subject, label, length=length, tokens=min(LONG_TOKENS << min(attempt, DOUBLINGS), room))


async def generate(subject: Subject, request: GenerateRequest) -> Generation:
    """The generation, which must be whole."""
    made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    require_whole(request, made)
    return made


def require_whole(request: GenerateRequest, made: Generation) -> None:
    """All tokens that were asked for, each with its logprob and in one version span."""
    asked = request.sampling.max_new_tokens
    expect(made.finish_reason is FinishReason.LENGTH, f"it ended by {made.finish_reason}, not by length")
    expect(len(made.output_ids) == asked, f"{len(made.output_ids)} tokens came, {asked} were asked for")
    require_sound(request, made)


def require_sound(request: GenerateRequest, made: Generation) -> None:
    """What holds for every generation, also for one that was cut off."""
    expect(made.request_id == request.request_id, f"{request.request_id} came back as {made.request_id}")
    count = len(made.output_ids)
    expect(len(made.logprobs) == count, f"{count} tokens came with {len(made.logprobs)} logprobs")
    end = 0
    for span in made.version_spans:
        expect(span.start == end < span.end, f"the version spans {made.version_spans} have a gap or an empty one")
        end = span.end
    expect(end == count, f"the version spans end at {end}, the tokens at {count}")


@dataclass(slots=True)
class Flight:
    """A generation that has begun. first: what was seen first of it; so_far: what it has made; task: what comes of
    it."""

    request: GenerateRequest
    task: asyncio.Task[Generation]
    first: Generation | None = None
    so_far: Generation | None = None
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def length(self) -> int:
        return len(self.so_far.output_ids) if self.so_far else 0


def require_cut_off(flight: Flight, made: Generation) -> None:
    """An end by abort, with the tokens that had been seen before it."""
    expect(made.finish_reason is FinishReason.ABORT, f"it ended by {made.finish_reason}, not by abort")
    require_sound(flight.request, made)
    seen = flight.first.output_ids if flight.first else ()
    expect(made.output_ids[: len(seen)] == seen != (), "it came back without the tokens that it had")


async def until_grown(flight: Flight) -> None:
    """Waits until more of it is seen, or it has ended."""
    flight.grown.clear()
    grown = asyncio.create_task(flight.grown.wait())
    await asyncio.wait([grown, flight.task], return_when=asyncio.FIRST_COMPLETED)
    grown.cancel()


@asynccontextmanager
async def in_flight(subject: Subject, requests: list[GenerateRequest]) -> AsyncIterator[list[Flight]]:
    """Generations that begin together, each of which has its first token. Those that run at the end are given up."""
    flights = [_take_off(subject, request) for request in requests]
    try:
        await asyncio.gather(*map(until_grown, flights))
        yield flights
    finally:
        for flight in flights:
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)


def _take_off(subject: Subject, request: GenerateRequest) -> Flight:
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
    """Lets `look` at a long generation in flight, as `catch_together` does. `change` is made to its request."""

    def make(attempt: int) -> list[GenerateRequest]:
        return [change(ask_long(subject, f"{label}-{attempt}", attempt))]

    await catch_together(subject, make, lambda flights: look(flights[0]))


async def catch_together(
    subject: Subject,
    make: Callable[[int], list[GenerateRequest]],
    look: Callable[[list[Flight]], Awaitable[bool]],
) -> None:
    """Lets `look` at generations in flight, and where it says that they had ended too soon, at others. `make` makes
    their requests by the number of the attempt, longer ones each time (`ask_long`)."""
    for attempt in range(ATTEMPTS):
        requests = make(attempt)
        async with in_flight(subject, requests) as flights:
            if await look(flights):
                return
    longest = max(request.sampling.max_new_tokens for request in requests)
    raise Lacking(
        f"generations of {longest} tokens end too soon to be caught in the middle; the context has room for "
        f"{subject.info.context_length}"
    )


async def require_waiting(task: asyncio.Task[Generation]) -> None:
    """Watches for a moment that nothing comes of a request."""
    await asyncio.wait([task], timeout=NOTHING_SECONDS)
    expect(not task.done(), "a request was answered although it had to wait")


async def until_idle(subject: Subject) -> None:
    """Waits until the engine has nothing to do."""
    end = time.monotonic() + IDLE_DEADLINE
    while True:
        load = await subject.engine.loads()
        if not load.running_requests and not load.waiting_requests:
            return
        expect(
            time.monotonic() < end,
            f"{load.running_requests} requests run and {load.waiting_requests} wait {IDLE_DEADLINE:.0f} s later",
        )
        await asyncio.sleep(POLL_SECONDS)


async def require_ended(subject: Subject, flight: Flight) -> None:
    """The server is done with it, all its tokens made; the last of them may be on their way."""
    running = (await subject.engine.loads()).running_requests
    expect(not running, f"{running} requests still run")
    await asyncio.wait([flight.task], timeout=IDLE_DEADLINE)
    expect(flight.task.done(), "the server is idle, and a request is not answered")
    require_whole(flight.request, await flight.task)


async def fingerprint(subject: Subject) -> Generation:
    """What the weights make of a fixed prompt, without anything cached."""
    await subject.engine.flush_cache()
    return await generate(subject, ask(subject, "fingerprint", length=12, tokens=12))


def alike(one: Generation, two: Generation) -> bool:
    """Whether two greedy generations are the work of the same weights."""
    return one.output_ids == two.output_ids and bool(abs(one.logprobs - two.logprobs).max() < CLOSE)
