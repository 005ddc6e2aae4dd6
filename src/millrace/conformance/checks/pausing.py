"""Checks of pauses in each mode, with a request in flight."""

import asyncio
from collections.abc import Sequence
from functools import partial

from millrace.conformance.check import Check, Subject, check, expect
from millrace.conformance.requests import (
    Flight,
    ask,
    catch,
    generate,
    require_cut_off,
    require_waiting,
    require_whole,
)
from millrace.types import Capability, FinishReason, Health, PauseMode


@check("pause.abort", "mode abort: running requests return with their tokens", Capability.PAUSE_ABORT)
async def abort(subject: Subject) -> None:
    await catch(subject, "pause-abort", partial(_pause, subject, PauseMode.ABORT))


@check("pause.retract", "mode retract: running requests stop, and continue after the pause", Capability.PAUSE_RETRACT)
async def retract(subject: Subject) -> None:
    await catch(subject, "pause-retract", partial(_pause, subject, PauseMode.RETRACT))


@check("pause.keep", "mode keep: running requests stop, and continue after the pause", Capability.PAUSE_KEEP)
async def keep(subject: Subject) -> None:
    await catch(subject, "pause-keep", partial(_pause, subject, PauseMode.KEEP))


async def _pause(subject: Subject, mode: PauseMode, flight: Flight) -> bool:
    """Pause twice and resume twice. Return False if the request had ended before the pause."""
    await subject.engine.pause(mode)
    newcomer = asyncio.create_task(generate(subject, ask(subject, "newcomer")))
    try:
        await subject.engine.pause(mode)
        state = await subject.engine.health()
        expect(state is Health.PAUSED, f"it is paused and reports {state}")
        await require_waiting(newcomer)
        if caught := await _caught(mode, flight):
            await require_waiting(newcomer)
        await subject.engine.resume()
        await subject.engine.resume()
        await newcomer
        if mode is not PauseMode.ABORT:
            require_whole(flight.request, await flight.task)
        return caught
    finally:
        newcomer.cancel()
        await asyncio.wait([newcomer])
        await subject.engine.resume()


async def _caught(mode: PauseMode, flight: Flight) -> bool:
    if mode is PauseMode.ABORT:
        made = await flight.task
        if made.finish_reason is FinishReason.LENGTH:
            return False
        require_cut_off(flight, made)
        return True
    if flight.task.done():
        return False
    length = flight.length
    await require_waiting(flight.task)
    expect(flight.length == length, f"{flight.length - length} tokens were generated during the pause")
    return True


@check("pause.resume_running", "resuming an engine that is not paused changes nothing")
async def resume_running(subject: Subject) -> None:
    await subject.engine.resume()
    await generate(subject, ask(subject, "resume"))


CHECKS: Sequence[Check] = (abort, retract, keep, resume_running)
