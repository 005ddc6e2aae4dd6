"""A small server on an engine's host, which brings versions there when it is told to. Stock engines can't apply by
themselves what has changed; they read the whole version from the folder that it answers with."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from millrace.engines.embedded.auth import Keys, allowed
from millrace.engines.embedded.replies import reply
from millrace.errors import ConfigError, MillraceError

if TYPE_CHECKING:
    from millrace.weights.replica import Replica

COURIER_KEY = "MILLRACE_COURIER_KEY"  # an environment variable, where courier and trainer find it
SHUTDOWN_GRACE = 0.5  # seconds for answers that are on their way when the server is told to end

logger = logging.getLogger(__name__)


class BringBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: NonNegativeInt


class CourierServer:
    """Answers for `replica`. One version is brought at a time, also for those who have hung up since."""

    def __init__(self, replica: "Replica", *, key: str | None) -> None:
        self._replica = replica
        self._keys = Keys(None, key)
        self._thread = ThreadPoolExecutor(1, "courier")

    async def start(self, sock: socket.socket) -> web.AppRunner:
        """Serves on a bound socket."""
        app = web.Application(middlewares=[self._guard])
        app.add_routes([web.get("/health", self._health), web.post("/bring", self._bring)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_GRACE)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        return runner

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not allowed(request.path, request.headers.get("Authorization"), self._keys):
            return web.Response(text=f"this route needs the key in {COURIER_KEY}", status=401)
        return await handler(request)

    async def _health(self, http: web.Request) -> web.Response:  # noqa: ARG002
        return reply({"status": "ok"})

    async def _bring(self, http: web.Request) -> web.Response:
        try:
            version = BringBody.model_validate_json(await http.read()).version
        except ValidationError as error:
            return web.Response(text=str(error), status=400)
        try:
            path, digest = await asyncio.get_running_loop().run_in_executor(self._thread, self._replica.bring, version)
        except MillraceError as error:
            logger.error("version %d: %s", version, error)
            return web.Response(text=str(error), status=500)
        logger.info("version %d is in %s", version, path)
        return reply({"path": str(path), "digest": digest})


def bind(host: str, port: int, *, key: str | None) -> socket.socket:
    """Raises ConfigError where that is not possible: beyond this host, only with a key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if key is None and not ipaddress.ip_address(address[0]).is_loopback:
            raise ConfigError(f"others reach {host}: set {COURIER_KEY}, here and for the trainer, or use 127.0.0.1")
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port} ({error}); choose another --host or --port") from error
