"""Start the engines of a fleet together, and log the names of those that are not up yet."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path

from millrace.engines.start import Replica

LOG_SECONDS = 5.0  # between messages about the engines that are not up

logger = logging.getLogger(__name__)


async def start_all(starts: Mapping[str, Coroutine[object, object, Replica]], log_dir: Path) -> Sequence[Replica]:
    """Run the starts concurrently, and return the engines in the same order. `starts`: by the engines' names.

    The log names the engines that are not up every few seconds. If a start fails, the other engines are ended, and its
    error is raised.
    """
    tasks = {name: asyncio.create_task(start, name=name) for name, start in starts.items()}
    reporter = asyncio.create_task(_report(tasks, log_dir))
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
        reporter.cancel()


async def _report(tasks: Mapping[str, "asyncio.Task[Replica]"], log_dir: Path) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(LOG_SECONDS)
        for name, task in tasks.items():
            if not task.done():
                logger.info("waiting for %s for %.0f s now%s", name, time.monotonic() - started, _logs(log_dir, name))


def _logs(log_dir: Path, name: str) -> str:
    """Return a hint at the engine's logs, or nothing for an engine that this process did not start."""
    logs = [*log_dir.glob(f"{name}.log"), *log_dir.glob(f"{name}-node*.log")]
    return f"; see {', '.join(map(str, logs))}" if logs else ""
