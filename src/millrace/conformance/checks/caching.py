"""Checks of the prefix cache."""

from collections.abc import Sequence

from millrace.conformance.check import Check, CheckFailed, Lacking, Subject, check, expect
from millrace.conformance.requests import Flight, ask, catch, generate, require_ended
from millrace.errors import EngineTimeout
from millrace.types import Capability, PauseMode

PREFIX = 48  # tokens; caches keep complete pages of up to 32


@check("cache.flush", "a repeated prompt is read from the cache, and after a flush it is not")
async def flush(subject: Subject) -> None:
    await warm(subject, "flush")
    await subject.engine.flush_cache()
    again = await generate(subject, ask(subject, "flush", length=PREFIX))
    expect(again.cached_tokens == 0, f"{again.cached_tokens} tokens are still cached")


async def warm(subject: Subject, label: str) -> None:
    """Get the prompt of this label into the cache. Raises Lacking if the engine reports no cached tokens."""
    request = ask(subject, label, length=PREFIX)
    await generate(subject, request)
    if not (await generate(subject, request)).cached_tokens:
        raise Lacking(f"it does not cache a prefix of {PREFIX} tokens, or does not report it")


@check("cache.flush_waits", "a flush waits for running requests, and does not disturb them")
async def flush_waits(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        caught = not flight.task.done()
        await subject.engine.flush_cache()
        await require_ended(subject, flight)
        return caught

    await catch(subject, "flush-waits", look)


@check("cache.flush_deadline", "a flush raises EngineTimeout if requests do not end", Capability.PAUSE_KEEP)
async def flush_deadline(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await subject.engine.pause(PauseMode.KEEP)
        try:
            if flight.task.done():
                return False
            await subject.engine.flush_cache(deadline=0.2)
        except EngineTimeout:
            return True
        finally:
            await subject.engine.resume()
        if flight.length == flight.request.sampling.max_new_tokens:
            return False
        raise CheckFailed("the cache was flushed while a request was running")

    await catch(subject, "flush-deadline", look)


CHECKS: Sequence[Check] = (flush, flush_waits, flush_deadline)
