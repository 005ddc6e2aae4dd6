"""The config file changed, and a signal: engines are added to a run that goes on, or taken from it."""

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
    """As long as the block runs, SIGHUP has the settings read again by `reload`, and brings the fleet to their
    `engine.replicas`. What can't be taken is told in the log, and the run goes on as it was."""
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
            wanted = reload()
            require_only_replicas(config, wanted)
            await bring_to(fleet, wanted.engine.replicas)
        except MillraceError as error:
            logger.error("the settings were read again, and the run goes on as it was: %s", error)


def require_only_replicas(before: RunConfig, after: RunConfig) -> None:
    """Raises ConfigError where more than `engine.replicas` has changed, or that can't."""
    engine = before.engine.model_copy(update={"replicas": after.engine.replicas})
    alike = before.model_copy(update={"engine": engine})
    changed = [name for name in RunConfig.model_fields if getattr(alike, name) != getattr(after, name)]
    if changed:
        raise ConfigError(
            f"only engine.replicas can change while a run goes on, and {', '.join(changed)} is another; a new start "
            "with --resume takes all of them"
        )


async def bring_to(fleet: Fleet, replicas: int) -> None:
    """Starts engines, or takes those out that came last, until there are so many."""
    while len(fleet.snapshot.replicas) < replicas:
        name = await fleet.add()
        logger.warning("%s has joined", name)
    while len(fleet.snapshot.replicas) > replicas:
        name = fleet.snapshot.replicas[-1].name
        await fleet.remove(name)
        logger.warning("%s has left", name)
