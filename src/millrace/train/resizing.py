"""Resizing the fleet of a running training: after a change of the config file, SIGHUP adds or removes engines."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from millrace.config.models import RunConfig
from millrace.errors import ConfigError, MillraceError
from millrace.fleet.fleet import Fleet

logger = logging.getLogger(__name__)


@asynccontextmanager
async def resizable(fleet: Fleet, config: RunConfig, reload: Callable[[], RunConfig]) -> AsyncIterator[None]:
    """Resize the fleet on SIGHUP while the block runs.

    SIGHUP calls `reload` and resizes the fleet to the `engine.replicas` of the settings that it returns. If the
    settings are invalid or change anything else, an error is logged, and the run continues unchanged.
    """
    signalled = asyncio.Event()
    task = asyncio.create_task(_follow(fleet, config, reload, signalled))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, signalled.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _follow(fleet: Fleet, config: RunConfig, reload: Callable[[], RunConfig], signalled: asyncio.Event) -> None:
    while True:
        await signalled.wait()
        signalled.clear()
        try:
            reloaded = reload()
            require_only_replicas(config, reloaded)
            fleet.autoscale(reloaded.engine.scale)
            if isinstance(replicas := reloaded.engine.replicas, int):
                await bring_to(fleet, replicas)
            now = f"{replicas}" if isinstance(replicas, int) else f"from {replicas.min} to {replicas.max}"
            logger.warning("SIGHUP: the settings were read again, and engine.replicas is %s", now)
        except MillraceError as error:
            logger.error("the new settings were not applied, and the run continues unchanged: %s", error)


def require_only_replicas(before: RunConfig, after: RunConfig) -> None:
    """Raise ConfigError if anything but `engine.replicas` has changed."""
    engine = before.engine.model_copy(update={"replicas": after.engine.replicas})
    expected = before.model_copy(update={"engine": engine})
    changed = [name for name in RunConfig.model_fields if getattr(expected, name) != getattr(after, name)]
    if changed:
        raise ConfigError(
            f"only engine.replicas can change during a run, but {', '.join(changed)} has changed; restart with "
            "--resume to apply all changes"
        )


async def bring_to(fleet: Fleet, replicas: int) -> None:
    """Start engines, or remove the latest ones, until the fleet has `replicas` engines."""
    while len(fleet.snapshot.replicas) < replicas:
        name = await fleet.add()
        logger.warning("%s has joined the fleet", name)
    while len(fleet.snapshot.replicas) > replicas:
        name = fleet.snapshot.replicas[-1].name
        await fleet.remove(name)
        logger.warning("%s has left the fleet", name)
