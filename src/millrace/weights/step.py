"""One step of a publish on one engine."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from millrace.errors import EngineError, EngineTimeout


@dataclass(frozen=True, slots=True)
class StepResult:
    """How a step went on one engine.

    seconds: the time that it took.
    error: why it failed; None if it did not.
    blameless: it failed only because another engine or a sidecar did. The publisher sends the version to this engine
        again.
    """

    seconds: float
    error: EngineError | None = None
    blameless: bool = False


async def take_step(engine: str, step: str, work: Awaitable[None], share: float) -> StepResult:
    """Await `work`, which is the step `step` on `engine`, and return how it went.

    share: the seconds that it may take, half of the time that is left for the publish.

    An EngineError is returned in the result. Any other error is raised.
    """
    error: EngineError | None = None
    begun = time.monotonic()
    try:
        async with asyncio.timeout(share):
            await work
    except EngineError as failed:
        error = failed
    except TimeoutError:
        error = EngineTimeout(engine, f"{step} took longer than {share:.1f} s, half of the time that was left")
    return StepResult(time.monotonic() - begun, error)
