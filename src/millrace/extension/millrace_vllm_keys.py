"""Middleware that checks API keys, loaded into a vLLM server by `--middleware millrace_vllm_keys.Keys`.

vLLM's own key guards the routes that generate, but every program that reaches the port can use the control routes of
its development mode. With this middleware every route needs a key, as `Authorization: Bearer KEY`, except the routes
that health probes and metrics scrapers use. The data key is for generating and reading. All other routes need the admin
key, also routes that this file does not know.

The keys come from the environment variables MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY, because a list of processes
does not show those. A server without them does not start. The file imports only the standard library.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
    """An ASGI middleware that answers requests without the right key with status 401."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._data = os.environ["MILLRACE_API_KEY"].encode()
        self._admin = os.environ["MILLRACE_ADMIN_API_KEY"].encode()
        if not self._data or not self._admin:
            raise ValueError("MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY must not be empty")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refuse(send)

    def _is_allowed(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
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


async def refuse(send: Send) -> None:
    """Answer with status 401."""
    body = json.dumps({"error": "a key is missing, or is not the one for this route"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
