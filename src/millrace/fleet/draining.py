"""How an engine that leaves the fleet is emptied: its requests end, or are aborted and continue on another engine."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from millrace.errors import EngineError
from millrace.fleet.replicas import OwnedReplicaSet

LOOK_SECONDS = 0.1  # between two looks at what an engine runs
ABORT_AGAIN = 1.0  # seconds after which requests that had not yet reached the engine are aborted, too

logger = logging.getLogger(__name__)


async def drained(
    replicas: OwnedReplicaSet, name: str, deadline: float, *, otherwise: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until an engine has no requests, also none of other processes. Return whether that is so.

    It is not if `deadline` seconds have passed, or `otherwise()` holds before. An engine that does not answer has none.
    """
    engine, ends, empty = replicas.by_name[name].engine, time.monotonic() + deadline, False
    while True:
        if replicas.observer.is_idle(name):
            try:
                async with asyncio.timeout(max(ends - time.monotonic(), LOOK_SECONDS)):
                    load = await engine.loads()
            except (EngineError, TimeoutError):
                return True
            before, empty = empty, not load.running_requests + load.waiting_requests
            if before and empty:  # twice: a request of another process may have been on its way
                return True
        else:
            empty = False
        if otherwise() or time.monotonic() >= ends:
            return False
        await asyncio.sleep(LOOK_SECONDS)


async def moved(replicas: OwnedReplicaSet, name: str, deadline: float) -> None:
    """Abort the requests that an engine still has, until it has none. Their clients continue them on other engines."""
    engine, ends = replicas.by_name[name].engine, time.monotonic() + deadline
    logger.info("%s leaves, and its requests move to other engines", name)
    while (left := ends - time.monotonic()) > 0:
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(left):
                await engine.abort()
        if await drained(replicas, name, min(ABORT_AGAIN, left)):
            return
    logger.warning("%s leaves, and has not given all of its requests back", name)
