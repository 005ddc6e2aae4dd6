"""Servers of the page: one for the folders of runs, and one with the metrics of a fleet that is at work."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from millrace.http.hosts import is_loopback
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.launch.ports import unbracketed, url_of
from millrace.serve.server import bind, serve_metrics
from millrace.serve.view import Observer
from millrace.viewer.routes import add_routes
from millrace.viewer.runs import find_runs
from millrace.viewer.site import Site

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve_runs(root: Path, host: str, port: int) -> AsyncIterator[str]:
    """Serve the page of a run's folder, or of a folder of runs, while the block runs. Yields the URL.

    port: 0 lets the kernel choose one. Raises ConfigError if there is no run, or if the port can't be bound.
    """
    runs = find_runs(root)
    app = web.Application()
    add_page(app, Site(runs, None if root in runs.values() else root), host)
    with bind(host, port, "the page", "--port") as sock:
        async with serving(app, sock, cancel=True):
            yield url_of(*sock.getsockname()[:2])


def serve_run(observer: Observer, host: str, port: int, folder: Path | None = None) -> AbstractAsyncContextManager[str]:
    """Serve the metrics of a fleet, as `serve_metrics` does, with the page at `/`. The block gets the URL.

    folder: that of the run whose curves and samples the page shows; None for a fleet without a run.
    """
    runs = {} if folder is None else {folder.name: folder}
    return serve_metrics(observer, host, port, extend=lambda app: add_page(app, Site(runs, live=True), host))


def add_page(app: web.Application, site: Site, host: str) -> None:
    """Add the page to an application that listens at `host`, and what keeps other sites from reading it."""
    app.middlewares.append(_guard(host))

    async def headed(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)

    app.on_response_prepare.append(headed)
    add_routes(app, site)


def _host(header: str) -> str:
    """Return the name or address in a Host header, without its port."""
    try:
        return unbracketed(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return header


def _guard(host: str) -> Middleware:
    """Return a middleware that refuses what another site's page may send.

    A page of another site can give its own name this host's address, and then read what listens on it. Its requests
    have that name as their host.
    """
    loopback = is_loopback(host)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = _host(request.host)
        if loopback and name and not is_loopback(name):
            message = f"this server answers at localhost alone, and not as {name}"
            return reply({"error": message}, 403)
        if request.path.startswith("/api/") and request.headers.get("Sec-Fetch-Site", "none") not in (
            "none",
            "same-origin",
        ):
            return reply({"error": "pages of other sites can't read this server"}, 403)
        return await handler(request)

    return guard
