"""Middleware that checks API keys, and answers two control routes better than vLLM, loaded into a vLLM server by
`--middleware millrace_vllm_keys.Keys`.

vLLM's own key guards the routes that generate, but every program that reaches the port can use the control routes of
its development mode. With this middleware every route needs a key, as `Authorization: Bearer KEY`, except the routes
that health probes and metrics scrapers use. The data key is for generating and reading. All other routes need the admin
key, also routes that this file does not know.

The keys come from the environment variables MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY, because a list of processes
does not show those. A server without them does not start.

vLLM's `/pause` waits for 20 ms after the scheduler has paused, so that the answers of interrupted requests come before
its own. By vLLM's own comment that is not needed for correctness, and Millrace waits for these answers itself. It
therefore asks for `/pause?...&at_once=true`, which the middleware answers without the wait.

vLLM's `/collective_rpc` calls a method in all of its workers, but returns the answers of only the first data-parallel
rank's. Millrace asks for `/collective_rpc?every_rank=true`, which the middleware answers with those of all.

A server without the middleware ignores these parameters. The file imports only the standard library.
"""

import asyncio
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
            if not await answered_here(self._path(scope), scope, receive, send):
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


async def answered_here(path: str, scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer a request that is answered here, and return whether it was; if not, vLLM must answer."""
    if scope.get("method") != "POST":
        return False
    if path == "/pause" and await paused_at_once(scope):
        await answer(send, 200, {"status": "paused"})
        return True
    if path == "/collective_rpc" and query_of(scope).get("every_rank") == "true":
        client, cores = cores_of(scope)
        if cores:
            await answer(send, *await called_in_every_rank(client, cores, receive))
            return True
    return False


def query_of(scope: Scope) -> dict[str, str]:
    """The parameters of a request's query."""
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    return {name: values[-1] for name, values in query.items()}


async def paused_at_once(scope: Scope) -> bool:
    """Pause the server if this request of `/pause` asks for it. Return whether that was done; if not, vLLM must answer.

    The calls are those that `AsyncLLM.pause_generation` of vLLM 0.23 and 0.32 makes before it waits.
    """
    query = query_of(scope)
    if query.get("at_once") != "true":
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


def cores_of(scope: Scope) -> tuple[Any, list[Any]]:
    """Return vLLM's client of its engine cores, and the cores' ids in the order of the data-parallel ranks. There are
    no ids if there is one core."""
    client = scope["app"].state.engine_client.engine_core
    cores = list(getattr(client, "core_engines", ()))
    return client, cores if len(cores) > 1 else []


async def called_in_every_rank(client: Any, cores: list[Any], receive: Receive) -> tuple[int, dict[str, Any]]:
    """Carry out a request of `/collective_rpc` in the cores, as vLLM 0.23 and 0.32 do. Return the status and the body
    of the answer: `results` has the workers' results, ordered by data-parallel rank and then by rank.

    It waits for all cores, also if one raises: a worker may still be in the call otherwise.
    """
    try:
        call = json.loads(await body_of(receive))
        method, arguments = str(call["method"]), tuple(map(str, call.get("args", ())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return 400, {"error": f"the body is no call: {type(error).__name__}: {error}"}
    calls = [client._call_utility_async("collective_rpc", method, None, arguments, {}, engine=core) for core in cores]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    if errors := [f"data-parallel rank {i}: {one}" for i, one in enumerate(answers) if isinstance(one, BaseException)]:
        return 500, {"error": "; ".join(errors)}
    return 200, {"results": [result for one in answers if isinstance(one, list) for result in one]}


async def body_of(receive: Receive) -> bytes:
    """Return the body of a request. Raises ValueError if its client leaves before it has sent all of it."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ValueError("the client has left")
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


async def answer(send: Send, status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer in JSON."""
    content = json.dumps(body).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": content})
