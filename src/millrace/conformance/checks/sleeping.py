"""Checks of sleep: memory is released and taken back."""

import asyncio
from collections.abc import Sequence

from millrace.conformance.check import Check, CheckFailed, Subject, check, expect, refused
from millrace.conformance.requests import (
    Flight,
    alike,
    ask,
    catch,
    fingerprint,
    generate,
    require_ended,
    require_waiting,
    require_whole,
)
from millrace.conformance.weights import folder, next_version, restore
from millrace.errors import EngineRefused
from millrace.types import ALL_MEMORY, Capability, Health, MemoryTag, PauseMode

WEIGHTS, KV_CACHE = frozenset({MemoryTag.WEIGHTS}), frozenset({MemoryTag.KV_CACHE})
REFUSAL_SECONDS = 3.0  # a refusal must come fast: paused requests never end by themselves


@check("sleep.kv_cache", "the KV cache sleeps and wakes, twice each, and the tokens stay the same", Capability.SLEEP)
async def kv_cache(subject: Subject) -> None:
    before = await fingerprint(subject)
    for _ in range(2):
        for call, state in ((subject.engine.sleep, Health.ASLEEP), (subject.engine.wake, Health.READY)):
            for _again in range(2):
                await call(KV_CACHE)
                await _require(subject, state)
    expect(alike(await fingerprint(subject), before), "it generates other tokens afterwards")


@check(
    "sleep.orders", "weights and KV cache sleep and wake in any order, and it serves after an update", Capability.SLEEP
)
async def orders(subject: Subject) -> None:
    folder(subject)
    before = await fingerprint(subject)
    parts = (WEIGHTS, KV_CACHE, ALL_MEMORY)
    for first in parts:
        for second in parts:
            await subject.engine.sleep(first)
            await subject.engine.sleep(ALL_MEMORY)
            await _require(subject, Health.ASLEEP)
            await subject.engine.wake(second)
            await subject.engine.wake(ALL_MEMORY)
    await restore(subject)
    expect(alike(await fingerprint(subject), before), "it generates other tokens afterwards")


@check("sleep.drains", "running requests end with all their tokens before the engine sleeps", Capability.SLEEP)
async def drains(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        caught = not flight.task.done()
        await subject.engine.sleep(KV_CACHE)
        await require_ended(subject, flight)
        await subject.engine.wake(KV_CACHE)
        return caught

    await catch(subject, "drains", look)


@check("sleep.requests_wait", "requests sent while it sleeps wait, and are answered once it is awake", Capability.SLEEP)
async def requests_wait(subject: Subject) -> None:
    await subject.engine.sleep(KV_CACHE)
    task = asyncio.create_task(generate(subject, ask(subject, "asleep")))
    await require_waiting(task)
    await subject.engine.wake(KV_CACHE)
    await task


@check(
    "sleep.requests_wait_for_weights",
    "requests sent while the weights sleep wait, and are answered once the weights are loaded again",
    Capability.SLEEP,
)
async def requests_wait_for_weights(subject: Subject) -> None:
    folder(subject)
    await subject.engine.sleep()
    task = asyncio.create_task(generate(subject, ask(subject, "asleep")))
    await require_waiting(task)
    await subject.engine.wake(WEIGHTS)
    await require_waiting(task)
    await restore(subject)
    await subject.engine.wake()
    await task


@check("sleep.update_refused", "an update is refused while the weights sleep", Capability.SLEEP)
async def update_refused(subject: Subject) -> None:
    folder(subject)
    await subject.engine.sleep(WEIGHTS)
    async with refused("an update of sleeping weights"):
        await subject.engine.begin_update(await next_version(subject))
    await subject.engine.wake()
    await restore(subject)


@check("sleep.update_then_kv_cache", "weights can be updated while the KV cache still sleeps", Capability.SLEEP)
async def update_then_kv_cache(subject: Subject) -> None:
    folder(subject)
    before = await fingerprint(subject)
    await subject.engine.sleep()
    await subject.engine.wake(WEIGHTS)
    await restore(subject)
    await _require(subject, Health.ASLEEP)
    await subject.engine.wake()
    expect(alike(await fingerprint(subject), before), "it generates other tokens afterwards")


@check(
    "sleep.paused_in_the_middle",
    "sleep is refused at once while a request is paused, and the request continues after the pause",
    Capability.SLEEP,
    Capability.PAUSE_KEEP,
)
async def paused_in_the_middle(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await subject.engine.pause(PauseMode.KEEP)
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                await subject.engine.sleep(KV_CACHE)
        except EngineRefused:
            caught = True
        except TimeoutError:
            raise CheckFailed(f"it neither slept nor refused within {REFUSAL_SECONDS:.0f} s") from None
        else:
            caught = False  # the request had ended before the pause
        await subject.engine.wake()
        await subject.engine.resume()
        require_whole(flight.request, await flight.task)
        return caught

    await catch(subject, "paused-sleep", look)


async def _require(subject: Subject, expected: Health) -> None:
    state = await subject.engine.health()
    expect(state is expected, f"it should be {expected} and reports {state}")


CHECKS: Sequence[Check] = (
    kv_cache,
    orders,
    drains,
    requests_wait,
    requests_wait_for_weights,
    update_refused,
    update_then_kv_cache,
    paused_in_the_middle,
)
