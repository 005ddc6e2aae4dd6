"""Requests that somebody ends."""

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
    generate,
    in_flight,
    require_cut_off,
    require_whole,
    until_idle,
)
from millrace.errors import EngineTimeout
from millrace.types import Capability, FinishReason, PauseMode

HEAD_START = 0.05  # seconds for a request to reach the server


@check("abort.one", "an aborted request comes back with its tokens; another whose name begins alike goes on")
async def one(subject: Subject) -> None:
    for attempt in range(ATTEMPTS):
        short = ask_long(subject, f"one-{attempt}")
        longer = replace(ask_long(subject, f"ten-{attempt}"), request_id=short.request_id + "0")
        async with in_flight(subject, [longer, short]) as (kept, ended):
            await subject.engine.abort(short.request_id)
            made = await ended.task
            require_whole(longer, await kept.task)
            if made.finish_reason is FinishReason.ABORT:
                require_cut_off(ended, made)
                await until_idle(subject)
                return
    raise Lacking("generations end too soon to be aborted")


@check("abort.all", "every request in flight comes back with its tokens")
async def everything(subject: Subject) -> None:
    for attempt in range(ATTEMPTS):
        async with in_flight(subject, [ask_long(subject, f"all-{attempt}-{i}") for i in range(3)]) as flights:
            await subject.engine.abort()
            made = [await flight.task for flight in flights]
            if all(generation.finish_reason is FinishReason.ABORT for generation in made):
                for flight, generation in zip(flights, made, strict=True):
                    require_cut_off(flight, generation)
                await until_idle(subject)
                return
    raise Lacking("generations end too soon to be aborted")


@check("abort.unknown", "aborting what is not there changes nothing")
async def unknown(subject: Subject) -> None:
    await subject.engine.abort("conformance-nobody")
    await subject.engine.abort()
    await generate(subject, ask(subject, "unknown"))


@check(
    "abort.paused",
    "a request that was aborted during a pause ends, at the latest when the pause does",
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


@check("abort.cancelled", "a caller that is cancelled leaves nothing running on the server")
async def cancelled(subject: Subject) -> None:
    for attempt in range(ATTEMPTS):
        task = asyncio.create_task(generate(subject, ask_long(subject, f"cancelled-{attempt}")))
        await asyncio.wait([task], timeout=HEAD_START)
        caught = task.cancel()
        await asyncio.wait([task])
        await until_idle(subject)
        if caught:
            return
    raise Lacking("generations end too soon to be cancelled")


@check("abort.deadline", "a generation whose deadline passes raises EngineTimeout and leaves nothing running")
async def deadline(subject: Subject) -> None:
    try:
        await subject.engine.generate(ask_long(subject, "late"), deadline=0.03)
    except EngineTimeout:
        await until_idle(subject)
        return
    raise CheckFailed("it came back after its deadline, or sooner than any engine can")


CHECKS: Sequence[Check] = (one, everything, unknown, paused, cancelled, deadline)
