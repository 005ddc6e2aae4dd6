"""Much at once, in any order."""

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
OFTEN = {"resume": 4, "wake weights": 4, "wake kv_cache": 4, "begin": 2, "load": 3, "commit": 2}  # so that it gets on
STROLL = 0.04  # seconds at most from one call to the next
WALK_REQUESTS = 4  # in flight at once
PATIENCE = 3.0  # seconds for one call of the walk
PAUSES = {
    Capability.PAUSE_ABORT: PauseMode.ABORT,
    Capability.PAUSE_RETRACT: PauseMode.RETRACT,
    Capability.PAUSE_KEEP: PauseMode.KEEP,
}


@check("crowd.generate", f"{CROWD} requests at once are answered once each, with what was asked for")
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
            await asyncio.gather(*(_wander(subject, f"{seed}-{walker}", asked) for walker in range(walkers)))
            await _calm(subject)
            for task in asked:
                ended = await task
                expect(not isinstance(ended, EngineUnreachable), f"a request broke off: {ended}")
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        await until_idle(subject)
        expect(alike(await fingerprint(subject), before), "afterwards it makes other tokens")

    who = "by two callers at once" if walkers > 1 else "by one caller"
    claim = f"{WALK_STEPS} control calls {who}, in no sensible order: each succeeds or is refused, and it serves on"
    return Check(f"crowd.walk_{seed}", claim, frozenset(), examine)


async def _wander(subject: Subject, seed: str, asked: list[asyncio.Task[Generation | EngineError]]) -> None:
    draw = random.Random(seed)  # noqa: S311 (no secret)
    steps = _steps(subject)
    names = sorted(steps)
    weights = [OFTEN.get(name, 1) for name in names]
    for number in range(WALK_STEPS):
        if sum(not task.done() for task in asked) < WALK_REQUESTS:
            request = ask(subject, f"walk-{seed}-{number}", tokens=draw.randrange(1, 60))
            asked.append(asyncio.create_task(_ended(subject, request)))
        await asyncio.sleep(draw.uniform(0, STROLL))
        try:
            async with asyncio.timeout(PATIENCE):
                await steps[draw.choices(names, weights)[0]]()
        except (EngineRefused, EngineTimeout, TimeoutError):
            continue  # as the contract has it, or the caller lost patience


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
    """How a request of the walk ends; it may be aborted, or refused while there are no whole weights."""
    try:
        made = await subject.engine.generate(request, deadline=GENERATE_DEADLINE)
    except EngineError as error:
        return error
    require_sound(request, made)
    return made


async def _calm(subject: Subject) -> None:
    """Out of any state: no update open, awake, the folder's weights, running."""
    with suppress(EngineRefused):
        await subject.engine.rollback()
    await subject.engine.wake()
    await restore(subject)
    await subject.engine.resume()


CHECKS: Sequence[Check] = (crowd, _walk(1, walkers=1), _walk(2, walkers=1), _walk(3, walkers=2))
