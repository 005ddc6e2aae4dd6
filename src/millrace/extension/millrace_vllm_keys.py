"""Middleware that checks API keys and pauses at once, loaded into a vLLM server by `--middleware
millrace_vllm_keys.Keys`.

vLLM's own key guards the routes that generate, but every program that reaches the port can use the control routes of
its development mode. With this middleware every route needs a key, as `Authorization: Bearer KEY`, except the routes
that health probes and metrics scrapers use. The data key is for generating and reading. All other routes need the admin
key, also routes that this file does not know.

The keys come from the environment variables MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY, because a list of processes
does not show those. A server without them does not start.

vLLM's `/pause` waits for 20 ms after the scheduler has paused, so that the answers of interrupted requests come before
its own. By vLLM's own comment that is not needed for correctness, and Millrace waits for these answers itself. It
therefore asks for `/pause?...&at_once=true`, which the middleware answers without the wait. A server without the
middleware ignores the parameter.

The file imports only the standard library.
"""

import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("vllm.millrace")

OPEN = ("/health", "/metrics", "/metrics/")
READING = ("GET", "HEAD")
# The POST routes that generate or read. Not all of /v1 does: some of its routes load LoRA adapters.
DATA = (
    "/inference/v1/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
)


class Keys:
    """An ASGI middleware that answers requests without the right key with status 401, and `/pause` at once."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._data = os.environ["MILLRACE_API_KEY"].encode()
        self._admin = os.environ["MILLRACE_ADMIN_API_KEY"].encode()
        if not self._data or not self._admin:
            raise ValueError("MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY must not be empty")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            if self._path(scope) == "/pause" and await paused_at_once(scope):
                await answer(send, 200, {"status": "paused"})
            else:
                await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = {"error": "a key is missing, or is not the one for this route"}
            await answer(send, 401, error, (b"www-authenticate", b"Bearer"))

    @staticmethod
    def _path(scope: Scope) -> str:
        path: str = scope.get("path", "")  # a lifespan has none
        return path.removeprefix(scope.get("root_path", ""))

    def _is_allowed(self, scope: Scope) -> bool:
        path = self._path(scope)
        method = scope.get("method", "")  # a websocket has none
        if method in READING and path in OPEN:
            return True
        key = bearer(scope["headers"])
        if hmac.compare_digest(key, self._admin):
            return True
        if not hmac.compare_digest(key, self._data):
            return False
        return scope["type"] == "websocket" or method in READING or (method == "POST" and path in DATA)


def bearer(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The request's key. Empty if the request has none or several."""
    sent = [value for name, value in headers if name.lower() == b"authorization"]
    if len(sent) != 1:
        return b""
    scheme, _, key = sent[0].partition(b" ")
    return key if scheme.lower() == b"bearer" else b""


async def paused_at_once(scope: Scope) -> bool:
    """Pause the server if this request of `/pause` asks for it. Return whether that was done; if not, vLLM must answer.

    The calls are those that `AsyncLLM.pause_generation` of vLLM 0.23 and 0.32 makes before it waits.
    """
    query = {name: values[-1] for name, values in parse_qs(scope.get("query_string", b"").decode("latin-1")).items()}
    if scope.get("method") != "POST" or query.get("at_once") != "true":
        return False
    clear = query.get("clear_cache", "true") == "true"
    try:
        engine = scope["app"].state.engine_client
        if clear:
            await engine.renderer.clear_mm_cache_async()
        await engine.engine_core.pause_scheduler_async(mode=query["mode"], clear_cache=clear)
    except Exception:  # vLLM's route pauses again, which changes nothing, and reports its own error
        log.exception("could not pause at once")
        return False
    return True


async def answer(send: Send, status: int, body: dict[str, str], *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer in JSON."""
    content = json.dumps(body).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": content})
