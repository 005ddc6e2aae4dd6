"""Generations of a stock engine that are still in flight when something else happens. On a fast machine a generation
may end too early. Then the helpers start another one."""

import asyncio
from collections.abc import Awaitable, Callable

from millrace.fleet.fleet import Fleet
from millrace.types import GenerateRequest, Generation, SamplingParams

LONG = 400  # tokens
ATTEMPTS = 20
DEADLINE = 120.0


def greedy(name: str, tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(
        (5, 17, 300, 42, 8), SamplingParams(tokens, temperature=0.0, ignore_eos=True), request_id=name
    )


async def start_in_flight(
    fleet: Fleet, name: str, other: "asyncio.Task[Generation] | None" = None
) -> "asyncio.Task[Generation]":
    """Starts a long generation and returns once the fleet's only engine runs it. `other` is a generation that may run
    at the same time."""
    [engine] = fleet.engines.values()
    for attempt in range(ATTEMPTS):
        task = asyncio.create_task(fleet.generate(greedy(f"{name}-{attempt}", LONG), deadline=DEADLINE))
        while not task.done():
            others = other is not None and not other.done()
            if (await engine.loads()).running_requests > others:
                return task
        await task
    raise AssertionError(f"{ATTEMPTS} generations ended before the engine reported them as running")


async def generate_across_update(
    fleet: Fleet,
    version: int,
    publish_first: Callable[[int], Awaitable[object]],
    publish_next: Callable[[int], Awaitable[object]],
) -> tuple[int, Generation]:
    """Calls `publish_first`, starts a long generation, and calls `publish_next` while it runs. Returns the number of
    the first version, which is `version` or later, and the generation."""
    for attempt in range(ATTEMPTS):
        number = version + 2 * attempt
        await publish_first(number)
        task = await start_in_flight(fleet, f"across-{number}")
        await publish_next(number + 1)
        generation = await task
        if len(generation.version_spans) > 1:
            return number, generation
    raise AssertionError(f"{ATTEMPTS} generations ended before the update began")
