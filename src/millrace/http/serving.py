"""Serve an aiohttp application while a block runs."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

SHUTDOWN_GRACE = 0.5  # seconds for responses in flight when the block ends


@asynccontextmanager
async def serving(app: web.Application, sock: socket.socket, *, cancel: bool = False) -> AsyncIterator[None]:
    """Serve the application on a bound socket while the block runs.

    cancel: whether a handler is cancelled when its client disconnects.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_GRACE, handler_cancellation=cancel)
    try:
        await runner.setup()
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()
