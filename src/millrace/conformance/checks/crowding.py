"""Checks of many concurrent calls, in any order."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from millrace.conformance.check import Check, Subject, check, expect
from millrace.conformance.requests import (
    GENERATE_DEADLINE,
    alike,
    ask,
    fingerprint,
    generate,
    require_sound,
    until_idle,
)
from millrace.conformance.weights import folder, load_disk, next_version, restore
from millrace.errors import EngineError, EngineRefused, EngineTimeout, EngineUnreachable
from millrace.types import Capability, GenerateRequest, Generation, MemoryTag, PauseMode

CROWD = 64
WALK_STEPS = 40
# Relative frequencies of the calls that make progress possible. That of the others is 1.
FREQUENCIES = {"resume": 4, "wake weights": 4, "wake kv_cache": 4, "begin": 2, "load": 3, "commit": 2}
LONGEST_GAP = 0.04  # seconds from one call of the walk to the next
WALK_REQUESTS = 4  # in flight at once
CALL_DEADLINE = 3.0  # seconds for one call of the walk
PAUSES = {
    Capability.PAUSE_ABORT: PauseMode.ABORT,
    Capability.PAUSE_RETRACT: PauseMode.RETRACT,
    Capability.PAUSE_KEEP: PauseMode.KEEP,
}


@check("crowd.generate", f"{CROWD} concurrent requests are each answered once, with the requested tokens")
async def crowd(subject: Subject) -> None:
    requests = [ask(subject, f"crowd-{i}", length=1 + i % 7, tokens=1 + i % 11) for i in range(CROWD)]
    made = await asyncio.gather(*(generate(subject, request) for request in requests))
    expect([one.prompt_tokens for one in made] == [1 + i % 7 for i in range(CROWD)], "answers were mixed up")
    await until_idle(subject)


def _walk(seed: int, walkers: int) -> Check:
    async def examine(subject: Subject) -> None:
        folder(subject)
        before = await fingerprint(subject)
        asked: list[asyncio.Task[Generation | EngineError]] = []
        try:
            await asyncio.gather(*(_call_randomly(subject, f"{seed}-{walker}", asked) for walker in range(walkers)))
            await _reset(subject)
            for task in asked:
                ended = await task
                expect(not isinstance(ended, EngineUnreachable), f"the connection of a request broke: {ended}")
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        await until_idle(subject)
        expect(alike(await fingerprint(subject), before), "it generates other tokens after the calls")

    callers = "each of two concurrent callers" if walkers > 1 else "one caller"
    claim = f"{WALK_STEPS} random control calls by {callers}: each succeeds or is refused, and it continues to serve"
    return Check(f"crowd.walk_{seed}", claim, frozenset(), examine)


async def _call_randomly(subject: Subject, seed: str, asked: list[asyncio.Task[Generation | EngineError]]) -> None:
    draw = random.Random(seed)  # noqa: S311 (no secret)
    steps = _steps(subject)
    names = sorted(steps)
    weights = [FREQUENCIES.get(name, 1) for name in names]
    for number in range(WALK_STEPS):
        if sum(not task.done() for task in asked) < WALK_REQUESTS:
            request = ask(subject, f"walk-{seed}-{number}", tokens=draw.randrange(1, 60))
            asked.append(asyncio.create_task(_ended(subject, request)))
        await asyncio.sleep(draw.uniform(0, LONGEST_GAP))
        try:
            async with asyncio.timeout(CALL_DEADLINE):
                await steps[draw.choices(names, weights)[0]]()
        except (EngineRefused, EngineTimeout, TimeoutError):
            continue  # the contract allows a refusal; a timeout is the caller's


def _steps(subject: Subject) -> dict[str, Callable[[], Awaitable[None]]]:
    engine, can = subject.engine, subject.info.capabilities

    async def begin() -> None:
        await engine.begin_update(await next_version(subject))

    async def load() -> None:
        await load_disk(subject, folder(subject))

    steps: dict[str, Callable[[], Awaitable[None]]] = {
        "abort": engine.abort,
        "begin": begin,
        "commit": engine.commit,
        "flush": lambda: engine.flush_cache(deadline=0.5),
        "resume": engine.resume,
        "rollback": engine.rollback,
    }
    if Capability.UPDATE_FROM_DISK in can:
        steps["load"] = load
    for capability, mode in PAUSES.items():
        if capability in can:
            steps[f"pause {mode}"] = lambda mode=mode: engine.pause(mode)  # type: ignore[misc]
    if Capability.SLEEP in can:
        for tag in MemoryTag:
            steps[f"sleep {tag}"] = lambda tag=tag: engine.sleep(frozenset({tag}))  # type: ignore[misc]
            steps[f"wake {tag}"] = lambda tag=tag: engine.wake(frozenset({tag}))  # type: ignore[misc]
    return steps


async def _ended(subject: Subject, request: GenerateRequest) -> Generation | EngineError:
    """Return the generation of a request of the walk, or its error.

    The request may be aborted, or refused while the engine has no complete weights.
    """
    try:
        made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    except EngineError as error:
        return error
    require_sound(request, made)
    return made


async def _reset(subject: Subject) -> None:
    """Return the engine to normal from any state: no open update, awake, the folder's weights, running."""
    with suppress(EngineRefused):
        await subject.engine.rollback()
    await subject.engine.wake()
    await restore(subject)
    await subject.engine.resume()


CHECKS: Sequence[Check] = (crowd, _walk(1, walkers=1), _walk(2, walkers=1), _walk(3, walkers=2))
