"""The metrics server of a fleet: `/metrics` for Prometheus, `/fleet` as JSON."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from millrace.errors import ConfigError
from millrace.http.serving import serving
from millrace.launch.ports import bound, unbracketed, url_of, why_not_bound
from millrace.serve.metrics import exposition
from millrace.serve.view import Observer


@asynccontextmanager
async def serve_metrics(
    observer: Observer, host: str, port: int, *, extend: Callable[[web.Application], None] | None = None
) -> AsyncIterator[str]:
    """Serve the metrics while the block runs, and yield the URL.

    port: 0 lets the kernel choose one.
    extend: adds more to the application, such as a page.

    There is no authentication: all clients can read, and none can change anything.
    Raises ConfigError if the port can't be bound.
    """

    async def metrics(http: web.Request) -> web.Response:  # noqa: ARG001
        text = exposition(await observer.look(), observer.event_log.metrics)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def fleet(http: web.Request) -> web.Response:  # noqa: ARG001
        return web.Response(body=orjson.dumps(await observer.look()), content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/fleet", fleet)])
    if extend is not None:
        extend(app)
    with bind(host, port, "metrics", "metrics.port") as sock:
        async with serving(app, sock, cancel=True):
            yield url_of(*sock.getsockname()[:2])


def bind(host: str, port: int, what: str, setting: str) -> socket.socket:
    """Return a listening socket for `what`. Raises ConfigError, which names the setting, if the port can't be bound."""
    try:
        return bound(unbracketed(host), port)
    except OSError as error:
        reason = why_not_bound(host, error)
        raise ConfigError(
            f"{what} can't be served at {host}:{port} ({reason}); set another {setting}, or 0 for any free port"
        ) from error
