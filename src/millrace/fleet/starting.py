"""Starts the engines of a fleet together, and says which ones it waits for."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path

from millrace.engines.start import Replica

TELL_SECONDS = 5.0  # from one message about the engines that are not up to the next

logger = logging.getLogger(__name__)


async def start_all(starts: Mapping[str, Coroutine[object, object, Replica]], log_dir: Path) -> Sequence[Replica]:
    """Runs `starts`, by the engines' names, and returns their engines in the same order. Every few seconds, the log
    names the engines that are not up. Raises what the first failed start raises; the others are ended then."""
    tasks = {name: asyncio.create_task(start, name=name) for name, start in starts.items()}
    teller = asyncio.create_task(_tell(tasks, log_dir))
    try:
        return await asyncio.gather(*tasks.values())
    except BaseException:
        for task in tasks.values():
            task.cancel()
        for result in await asyncio.gather(*tasks.values(), return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.end()
        raise
    finally:
        teller.cancel()


async def _tell(tasks: Mapping[str, "asyncio.Task[Replica]"], log_dir: Path) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(TELL_SECONDS)
        for name, task in tasks.items():
            if not task.done():
                logger.info("waiting for %s for %.0f s now%s", name, time.monotonic() - started, _logs(log_dir, name))


def _logs(log_dir: Path, name: str) -> str:
    """Where the engine's logs are; empty for an engine that somebody else started."""
    logs = [*log_dir.glob(f"{name}.log"), *log_dir.glob(f"{name}-node*.log")]
    return f"; see {', '.join(map(str, logs))}" if logs else ""
