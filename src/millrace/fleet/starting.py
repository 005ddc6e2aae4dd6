"""Start the engines of a fleet together, and log the names of those that are not up yet."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from millrace.config.engines import EngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.errors import LaunchError
from millrace.fleet.event_log import EventLog
from millrace.fleet.kept import KeptEngines

LOG_SECONDS = 5.0  # between messages about the engines that are not up

logger = logging.getLogger(__name__)


class Starter:
    """Starts the engines of a fleet, or attaches to them. `kept`: records them, and knows those that an earlier owner
    left. `event_log`: says when each start begins."""

    def __init__(self, config: EngineConfig, spec: LaunchSpec, kept: KeptEngines | None, event_log: EventLog) -> None:
        self._config, self._spec, self._kept, self._event_log = config, spec, kept, event_log

    async def start_all(self) -> Sequence[Replica]:
        """Start `config.first_replicas` engines, or take over those that an earlier owner left, up to
        `config.most_replicas`. Others of its are ended."""
        recorded = () if self._kept is None else self._kept.left
        numbers = range(self._config.most_replicas)
        left = [number for number in numbers if self._spec.name(self._config.kind, number) in recorded]
        first = max(self._config.first_replicas, *(number + 1 for number in left), 0)
        names = {self._spec.name(self._config.kind, number): number for number in numbers[:first]}
        starts = {name: self._find_or_start(name, number) for name, number in names.items()}
        started = await start_all(starts, self._spec.log_dir)
        if self._kept is not None:
            await self._kept.end_others()
        return started

    async def start(self, number: int) -> Replica:
        """Start the engine of this number.

        Raises what `millrace.engines.start.start` raises, and LaunchError if the config has no place for it.
        """
        require_place(self._config, number)
        with self._event_log.starting(self._spec.name(self._config.kind, number)):
            started = await start(self._config, replace(self._spec, replica=number))
            if self._kept is not None:
                try:
                    await self._kept.keep(started)
                except BaseException:
                    await started.end()
                    raise
        return started

    async def _find_or_start(self, name: str, number: int) -> Replica:
        found = None if self._kept is None else await self._kept.take_over(name)
        return await self.start(number) if found is None else found


def require_place(config: EngineConfig, replica: int) -> None:
    """Raises LaunchError if the config lists URLs or ports, and none for this replica."""
    for setting, places in {"urls": config.urls, "ports": config.ports}.items():
        if places is not None and replica >= len(places):
            raise LaunchError(f"engine.{setting} lists {len(places)} engines, and none for one more")


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
