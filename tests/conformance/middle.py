"""Generations of a stock engine that something meets in the middle. On a fast machine one may have ended before; then
another is begun."""

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


async def begun(
    fleet: Fleet, name: str, beside: "asyncio.Task[Generation] | None" = None
) -> "asyncio.Task[Generation]":
    """A long generation at which the fleet's only engine was seen at work, besides another if that is not done."""
    [engine] = fleet.engines.values()
    for attempt in range(ATTEMPTS):
        task = asyncio.create_task(fleet.generate(greedy(f"{name}-{attempt}", LONG), deadline=DEADLINE))
        while not task.done():
            others = beside is not None and not beside.done()
            if (await engine.loads()).running_requests > others:
                return task
        await task
    raise AssertionError(f"{ATTEMPTS} generations ended before they were seen")


async def across(
    fleet: Fleet, version: int, first: Callable[[int], Awaitable[object]], then: Callable[[int], Awaitable[object]]
) -> tuple[int, Generation]:
    """A long generation that begins with the version that `first` publishes, and in whose middle `then` publishes the
    next. Also returns the number of the first, which is `version` or later."""
    for attempt in range(ATTEMPTS):
        number = version + 2 * attempt
        await first(number)
        task = await begun(fleet, f"across-{number}")
        await then(number + 1)
        made = await task
        if len(made.version_spans) > 1:
            return number, made
    raise AssertionError(f"{ATTEMPTS} generations ended before an update had begun")
