"""Checks of aborted and cancelled requests."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from millrace.conformance.check import Check, CheckFailed, Lacking, Subject, check
from millrace.conformance.requests import (
    ATTEMPTS,
    Flight,
    ask,
    ask_long,
    catch,
    catch_together,
    generate,
    require_cut_off,
    require_whole,
    until_idle,
)
from millrace.errors import EngineTimeout
from millrace.types import Capability, FinishReason, GenerateRequest, Generation, PauseMode

HEAD_START = 0.05  # seconds for a request to reach the server


@check("abort.one", "an aborted request returns its tokens; a request whose id starts with the same text continues")
async def one(subject: Subject) -> None:
    def make(attempt: int) -> list[GenerateRequest]:
        short = ask_long(subject, f"one-{attempt}", attempt)
        longer = replace(ask_long(subject, f"ten-{attempt}", attempt), request_id=short.request_id + "0")
        return [longer, short]

    async def look(flights: list[Flight]) -> bool:
        kept, ended = flights
        await subject.engine.abort(ended.request.request_id)
        made = await ended.task
        require_whole(kept.request, await kept.task)
        return await _was_cut_off(subject, [(ended, made)])

    await catch_together(subject, make, look)


@check("abort.all", "every aborted request returns its tokens")
async def everything(subject: Subject) -> None:
    def make(attempt: int) -> list[GenerateRequest]:
        return [ask_long(subject, f"all-{attempt}-{number}", attempt) for number in range(3)]

    async def look(flights: list[Flight]) -> bool:
        await subject.engine.abort()
        return await _was_cut_off(subject, [(flight, await flight.task) for flight in flights])

    await catch_together(subject, make, look)


async def _was_cut_off(subject: Subject, ended: Sequence[tuple[Flight, Generation]]) -> bool:
    """Return whether the abort ended all of them early. If so, check their tokens."""
    if any(made.finish_reason is not FinishReason.ABORT for _, made in ended):
        return False
    for flight, made in ended:
        require_cut_off(flight, made)
    await until_idle(subject)
    return True


@check("abort.unknown", "aborting an unknown request changes nothing")
async def unknown(subject: Subject) -> None:
    await subject.engine.abort("conformance-unknown")
    await subject.engine.abort()
    await generate(subject, ask(subject, "unknown"))


@check(
    "abort.paused",
    "a request that is aborted during a pause ends, at the latest when the pause ends",
    Capability.PAUSE_KEEP,
)
async def paused(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await subject.engine.pause(PauseMode.KEEP)
        try:
            caught = not flight.task.done()
            await subject.engine.abort(flight.request.request_id)
        finally:
            await subject.engine.resume()
        made = await flight.task
        if caught and made.finish_reason is FinishReason.ABORT:
            require_cut_off(flight, made)
            return True
        return False

    await catch(subject, "paused", look)


@check("abort.cancelled", "a cancelled caller leaves no request running on the server")
async def cancelled(subject: Subject) -> None:
    for attempt in range(ATTEMPTS):
        task = asyncio.create_task(generate(subject, ask_long(subject, f"cancelled-{attempt}", attempt)))
        await asyncio.wait([task], timeout=HEAD_START)
        caught = task.cancel()
        await asyncio.wait([task])
        await until_idle(subject)
        if caught:
            return
    raise Lacking("generations end too soon to be cancelled")


@check("abort.deadline", "a generation that misses its deadline raises EngineTimeout and leaves no request running")
async def deadline(subject: Subject) -> None:
    try:
        await subject.engine.generate(ask_long(subject, "late"), deadline=0.03)
    except EngineTimeout:
        await until_idle(subject)
        return
    raise CheckFailed("it returned after its deadline, or faster than any engine can")


CHECKS: Sequence[Check] = (one, everything, unknown, paused, cancelled, deadline)
