"""Serve an aiohttp application while a block runs."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

log = logging.getLogger(__name__)
SHUTDOWN_GRACE = 0.5  # seconds for responses in flight when the block ends


@asynccontextmanager
async def serving(app: web.Application, sock: socket.socket, *, cancel: bool = False) -> AsyncIterator[None]:
    """Serve the application on a bound socket while the block runs.

    cancel: whether a handler is cancelled when its client disconnects.
    """
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=SHUTDOWN_GRACE, handler_cancellation=cancel, logger=log
    )
    try:
        await runner.setup()
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


def _tells_headers(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


log.addFilter(lambda record: not _tells_headers(record))  # a header that can't be read may hold a key
