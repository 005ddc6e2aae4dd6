"""Checks of requests that must not harm the server."""

from collections.abc import Sequence
from dataclasses import replace

from millrace.conformance.check import Check, Subject, check, expect, refused
from millrace.conformance.poison import REFUSED, SURVIVED, Maker
from millrace.conformance.requests import (
    GENERATE_DEADLINE,
    Flight,
    ask,
    catch,
    generate,
    in_flight,
    require_sound,
    require_whole,
)
from millrace.errors import EngineRefused

NEIGHBOUR_TOKENS = 40


def _refuses(name: str, make: Maker) -> Check:
    async def examine(subject: Subject) -> None:
        async with refused(name):
            await subject.engine.generate(make(subject.info, ask(subject, "poison")), deadline=GENERATE_DEADLINE)
        streamed = make(subject.info, ask(subject, "poison"))
        async with refused(f"{name}, streamed,"):
            async for _ in subject.engine.stream(streamed, deadline=GENERATE_DEADLINE):
                pass
        await generate(subject, ask(subject, "after poison"))

    return Check(f"refuse.{_short(name)}", f"it refuses {name}, and continues to serve", frozenset(), examine)


def _survives(name: str, make: Maker) -> Check:
    async def examine(subject: Subject) -> None:
        request = make(subject.info, ask(subject, "poison"))
        # A normal request shares its batch.
        async with in_flight(subject, [ask(subject, "neighbour", tokens=NEIGHBOUR_TOKENS)]) as flights:
            try:
                made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
                require_sound(request, made)
            except EngineRefused:
                pass
            finished = await flights[0].task
        require_whole(flights[0].request, finished)

    claim = f"it refuses or answers {name}, and continues to serve"
    return Check(f"survive.{_short(name)}", claim, frozenset(), examine)


def _short(name: str) -> str:
    return name.removeprefix("a ").removeprefix("an ").replace(" ", "_").replace("'", "")


@check("refuse.name_in_flight", "a second request with the id of a request in flight is refused; the first continues")
async def name_in_flight(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        second = replace(ask(subject, "second"), request_id=flight.request.request_id)
        try:
            await subject.engine.generate(second, deadline=GENERATE_DEADLINE)
            caught = False
            expect(flight.task.done(), "a second request with the same id was not refused")
        except EngineRefused:
            caught = True
        require_whole(flight.request, await flight.task)
        return caught

    await catch(subject, "twice", look)


CHECKS: Sequence[Check] = (
    *(_refuses(name, make) for name, make in REFUSED.items()),
    *(_survives(name, make) for name, make in SURVIVED.items()),
    name_in_flight,
)
