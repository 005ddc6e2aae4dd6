"""Checks of streamed generations."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from millrace.conformance.check import Check, Subject, check, expect
from millrace.conformance.requests import (
    GENERATE_DEADLINE,
    Flight,
    alike,
    ask,
    ask_long,
    catch,
    generate,
    require_sound,
    require_whole,
    until_idle,
)
from millrace.types import Capability, FinishReason, PauseMode

AFTERMATH = 2.5  # seconds; SGLang aborts a stream's id 2 s after its end, in case the caller has disconnected


@check("stream.cumulative", "each item starts with the previous one; the last is complete and equals generate's result")
async def cumulative(subject: Subject) -> None:
    request = ask(subject, "stream", tokens=24)
    pieces = [piece async for piece in subject.engine.stream(request, deadline=GENERATE_DEADLINE)]
    expect(len(pieces) > 1, "the stream had only one item")
    require_whole(request, pieces[-1])
    before: tuple[int, ...] = ()
    for piece in pieces:
        require_sound(request, piece)
        expect(piece.output_ids[: len(before)] == before, "an item does not start with the previous one")
        before = piece.output_ids
    expect(
        all(piece.finish_reason is FinishReason.ABORT for piece in pieces[:-1]),
        "an item before the last has a final finish reason",
    )
    expect(alike(pieces[-1], await generate(subject, ask(subject, "stream", tokens=24))), "generate's result differs")


@check("stream.closed_early", "closing a stream ends the request on the server")
async def closed_early(subject: Subject) -> None:
    stream = subject.engine.stream(ask_long(subject, "closed"), deadline=GENERATE_DEADLINE)
    await anext(stream)
    await stream.aclose()
    await until_idle(subject)


@check(
    "stream.name_again",
    "the id of an ended stream can be used again: the old request does not end the new one",
    Capability.PAUSE_KEEP,
)
async def name_again(subject: Subject) -> None:
    first = ask(subject, "first", tokens=4)
    async for _ in subject.engine.stream(first, deadline=GENERATE_DEADLINE):
        pass

    async def look(flight: Flight) -> bool:
        await subject.engine.pause(PauseMode.KEEP)
        caught = not flight.task.done()
        if caught:
            await asyncio.sleep(AFTERMATH)
        await subject.engine.resume()
        require_whole(flight.request, await flight.task)
        return caught

    await catch(subject, "second", look, lambda request: replace(request, request_id=first.request_id))


CHECKS: Sequence[Check] = (cumulative, closed_early, name_again)
