"""Checks of the prefix cache."""

from collections.abc import Sequence
from functools import partial

from millrace.conformance.check import Check, CheckFailed, Lacking, Subject, check, expect
from millrace.conformance.requests import MARGIN, Flight, alike, ask, catch, generate, require_ended
from millrace.conformance.weights import folder, restore
from millrace.errors import EngineTimeout
from millrace.types import Capability, PauseMode

PREFIX = 48  # tokens; caches keep complete pages of up to 32
WARMINGS = 16  # requests for a prompt, until one is answered from the cache
CROWDING = 8192  # most tokens of a prompt that takes the room of others


@check("cache.flush", "a repeated prompt is read from the cache, and after a flush it is not")
async def flush(subject: Subject) -> None:
    await warm(subject, "flush")
    await subject.engine.flush_cache()
    again = await generate(subject, ask(subject, "flush", length=PREFIX))
    expect(again.cached_tokens == 0, f"{again.cached_tokens} tokens are still cached")


@check(
    "cache.offload",
    "a prefix that left the device is read from host memory, and after a flush or an update it is not",
    Capability.KV_OFFLOAD,
)
async def offload(subject: Subject) -> None:
    folder(subject)
    for label, drop in (("offload-flush", subject.engine.flush_cache), ("offload-update", partial(restore, subject))):
        await crowd_out(subject, label)
        await drop()
        made = await generate(subject, ask(subject, label, length=PREFIX))
        expect(made.cached_tokens == 0, f"{made.cached_tokens} tokens are still cached ({label})")


async def crowd_out(subject: Subject, label: str) -> None:
    """Have the prompt of this label cached in host memory. Raises Lacking if it is gone when the device has no room."""
    request = ask(subject, label, length=PREFIX)
    first = await generate(subject, request)
    room, length = subject.info.cache_tokens, min(subject.info.context_length - MARGIN, CROWDING)
    if room is None:
        raise Lacking("it does not report the size of its KV cache")
    for number in range(room // length + 2):
        await generate(subject, ask(subject, f"{label}-{number}", length=length, tokens=1))
    again = await generate(subject, request)
    if not again.cached_tokens:
        raise Lacking(f"after {room} tokens of other prompts, host memory does not have a prefix of {PREFIX} tokens")
    expect(alike(first, again), "a prefix from host memory gives other tokens or logprobs")


async def warm(subject: Subject, label: str) -> None:
    """Get the prompt of this label into the cache. Raises Lacking if the engine reports no cached tokens.

    A server with data-parallel ranks may give each request to another rank, with a cache of its own.
    """
    request = ask(subject, label, length=PREFIX)
    for _ in range(WARMINGS):
        if (await generate(subject, request)).cached_tokens:
            return
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


CHECKS: Sequence[Check] = (flush, offload, flush_waits, flush_deadline)
