"""The HTTP server of every sidecar, whose routes are protected by a key. Its `Job` does the work."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from millrace.errors import ConfigError
from millrace.http.auth import has_key
from millrace.http.hosts import is_loopback
from millrace.http.replies import reply
from millrace.launch.ports import unbracketed, why_not_bound

SIDECAR_KEY = "MILLRACE_SIDECAR_KEY"  # the environment variable that sidecar and trainer read the key from

B = TypeVar("B", bound=BaseModel)


class Job(ABC):
    """The work of a sidecar. `does` describes it, after the sidecar's URL: "reads weights over UCX"."""

    does: str

    @abstractmethod
    def routes(self) -> Sequence[web.RouteDef]: ...


class SidecarServer:
    """Serves the routes of `job`. If `key` is set, every request must carry it."""

    def __init__(self, job: Job, *, key: str | None) -> None:
        self._job = job
        self._key = key

    def app(self) -> web.Application:
        """Return the application to serve."""
        app = web.Application(middlewares=[self._guard])
        app.add_routes([web.get("/health", self._health), *self._job.routes()])
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        keys = [] if self._key is None or request.path == "/health" else [self._key]
        if keys and not has_key(request.headers.get("Authorization"), keys):
            return web.Response(text=f"this route needs the key in {SIDECAR_KEY}", status=401)
        return await handler(request)

    async def _health(self, http: web.Request) -> web.Response:  # noqa: ARG002
        return reply({"status": "ok"})


async def body_of(http: web.Request, model: type[B]) -> B:
    """Return the request's body as `model`. Raises HTTPBadRequest if it is not valid."""
    try:
        return model.model_validate_json(await http.read())
    except ValidationError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def bind(host: str, port: int, *, key: str | None) -> socket.socket:
    """Return a socket that listens on `host` and `port`. Raises ConfigError if that is not possible, or if other hosts
    could reach it and there is no key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(unbracketed(host), port, type=socket.SOCK_STREAM)[0]
        if key is None and not is_loopback(str(address[0])):
            raise ConfigError(
                f"other hosts can reach {host}: set {SIDECAR_KEY}, here and for the trainer, or use 127.0.0.1"
            )
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = why_not_bound(host, error)
        raise ConfigError(f"can't listen on {host}:{port} ({reason}); choose another --host or --port") from error
