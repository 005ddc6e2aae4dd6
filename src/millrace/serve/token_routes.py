"""A fleet behind the routes of one vLLM server, for trainers and agents that expect one.

Data: `/inference/v1/generate` and `/v1/completions` (prompts as token ids), `/v1/models`, `/health`. Control, as
prime-rl's servers have it: `/pause`, `/resume` and `/update_weights` (a folder that this host can read).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from millrace.errors import (
    ArgumentError,
    DataError,
    EngineRefused,
    EngineTimeout,
    MillraceError,
    NoEngineError,
    PublishError,
)
from millrace.fleet.client import FleetClient
from millrace.fleet.owner import checked_key
from millrace.http.auth import has_key
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.launch.ports import url_of
from millrace.serve.publishing import publish_folder
from millrace.serve.server import bind
from millrace.serve.token_wire import CompletionBody, GenerateBody, answer, chunk, last_chunk
from millrace.types import GenerateRequest, RoutingContext

RETRIES = 2  # a request survives as many failures of engines
LARGEST_BODY = 64 * 2**20  # bytes: a prompt of some millions of tokens
OPEN = frozenset({"/health", "/ping"})  # routes that need no key

B = TypeVar("B", bound=BaseModel)


class UpdateBody(BaseModel):
    """The body of `/update_weights`. prime-rl sends None for weights that arrive by NCCL, which is refused."""

    model_config = ConfigDict(extra="forbid")

    weight_dir: Path | None


@asynccontextmanager
async def serve_tokens(
    fleet: FleetClient, *, key: str, host: str = "127.0.0.1", port: int = 0, model: str, timeout: float = 3600.0
) -> AsyncIterator[str]:
    """Serve a fleet as one vLLM server while the block runs, and yield its URL.

    Requests continue on another engine if theirs fails. The header `X-Session-ID` keeps the requests of one
    conversation on one engine.

    Args:
        fleet: The fleet, or a follower, which can't update weights.
        key: The key that all routes but `/health` ask for, as `Authorization: Bearer KEY`.
        host: The address to listen on.
        port: The port to listen on. 0 lets the kernel choose one.
        model: The name of the model, which `/v1/models` lists and requests may give.
        timeout: Seconds for one request.

    Raises:
        ConfigError: The port can't be bound.
        ArgumentError: The key is empty, or an HTTP header can't carry it.

    Example:

        async with open_fleet(config, folder, log_dir="logs") as fleet:
            async with serve_tokens(fleet, key=key, port=8000, model="policy") as url:
                await run_agents(url)
    """
    routes = _Routes(fleet, checked_key(key), model, timeout)
    app = web.Application(middlewares=[routes.guard], client_max_size=LARGEST_BODY)
    app.add_routes([
        web.get("/health", routes.health),
        web.get("/ping", routes.health),
        web.get("/v1/models", routes.models),
        web.post("/inference/v1/generate", routes.generate),
        web.post("/v1/completions", routes.complete),
        web.post("/pause", routes.pause),
        web.post("/resume", routes.resume),
        web.post("/update_weights", routes.update_weights),
    ])  # fmt: skip
    with bind(host, port, "requests", "port") as sock:
        async with serving(app, sock, cancel=True):  # which aborts the requests of a client that disconnects
            yield url_of(*sock.getsockname()[:2])


@dataclass(slots=True)
class _Routes:
    """The handlers of the routes."""

    fleet: FleetClient
    key: str
    model: str
    timeout: float
    open: asyncio.Event = field(default_factory=asyncio.Event)  # not set: paused
    ended: asyncio.Condition = field(default_factory=asyncio.Condition)  # notified when a request has ended
    running: int = 0
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.open.set()

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuse requests without the key, and answer errors in OpenAI's form."""
        if request.path not in OPEN and not has_key(request.headers.get("Authorization"), [self.key]):
            return _error(401, "this server needs its key, as `Authorization: Bearer KEY`")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except (ArgumentError, DataError, EngineRefused, PublishError) as error:
            return _error(400, str(error))
        except (NoEngineError, EngineTimeout) as error:
            return _error(503, str(error))
        except TimeoutError:  # while the server was paused, or its requests did not end
            return _error(503, f"not done within {self.timeout:g} s")
        except MillraceError as error:
            return _error(500, str(error))

    async def health(self, http: web.Request) -> web.Response:  # noqa: ARG002
        """Return 200 if an engine takes requests, or will once an update, a sleep or a restart is over, or when a
        request comes."""
        if self.fleet.snapshot.routable or self.fleet.interrupted or self.fleet.replicas.elastic:
            return web.Response()
        return _error(503, f"no engine takes requests: {self.fleet.snapshot.describe()}")

    async def models(self, http: web.Request) -> web.Response:  # noqa: ARG002
        """Return the model, and its context length."""
        length = self.fleet.context_length
        card = {"id": self.model, "object": "model", "created": self.started, "owned_by": "millrace"}
        return reply({"object": "list", "data": [{**card, "root": self.model, "max_model_len": length}]})

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """Answer `/inference/v1/generate`."""
        return await self._answer(http, await _read(http, GenerateBody))

    async def complete(self, http: web.Request) -> web.StreamResponse:
        """Answer `/v1/completions`."""
        return await self._answer(http, await _read(http, CompletionBody))

    async def pause(self, http: web.Request) -> web.Response:
        """Hold new requests until `/resume`.

        mode: `keep` lets running requests continue: an update interrupts and continues them itself. `wait` returns when
        they have ended. vLLM's `abort` is refused, since the fleet would continue the aborted requests.
        """
        mode = http.query.get("mode", "abort")
        if mode not in ("keep", "wait"):
            return _error(400, f"mode {mode!r} is not supported; pause with mode=keep or mode=wait")
        self.open.clear()
        if mode == "wait":
            async with asyncio.timeout(self.timeout), self.ended:
                await self.ended.wait_for(lambda: not self.running)
        return reply({"status": "paused"})

    async def resume(self, http: web.Request) -> web.Response:  # noqa: ARG002
        """Let requests through again."""
        self.open.set()
        return reply({"status": "resumed"})

    async def update_weights(self, http: web.Request) -> web.Response:
        """Publish the weights of a folder in Hugging Face's format as the next version."""
        body = await _read(http, UpdateBody)
        if body.weight_dir is None:
            return _error(400, "weight_dir is null: this server takes weights from a folder, and none by NCCL")
        return reply(await publish_folder(self.fleet, body.weight_dir))

    async def _answer(self, http: web.Request, body: GenerateBody | CompletionBody) -> web.StreamResponse:
        """Generate, and answer with the whole or with a stream."""
        if body.model not in (None, self.model):
            return _error(404, f"the model {body.model!r} is not served here; {self.model!r} is")
        requests = self._requests(body)
        routing = RoutingContext(session=http.headers.get("X-Session-ID"))
        async with self._admitted():
            if body.stream:
                return await self._stream(http, body, requests, routing)
            made = await self.fleet.generate_all(
                requests, n=body.sampling.n, deadline=self.timeout, routing=routing, retries=RETRIES
            )
        return reply(answer(body, self.model, requests, made))

    def _requests(self, body: GenerateBody | CompletionBody) -> list[GenerateRequest]:
        """Return a request for each prompt. Raises DataError if a prompt leaves no room for an answer."""
        requests = []
        for prompt in body.prompts:
            room = self.fleet.context_length - len(prompt)
            if room < 1:
                raise DataError(
                    f"the prompt has {len(prompt)} tokens, and the context length is {self.fleet.context_length}"
                )
            sampling, wanted = body.sampling.params(room), body.sampling.prompt_logprobs is not None
            requests.append(GenerateRequest(tuple(prompt), sampling, prompt_logprobs=wanted))
        return requests

    async def _stream(
        self,
        http: web.Request,
        body: GenerateBody | CompletionBody,
        requests: Sequence[GenerateRequest],
        routing: RoutingContext,
    ) -> web.StreamResponse:
        """Answer with server-sent events, each of which has the tokens since the one before."""
        if len(requests) > 1 or body.sampling.n > 1:
            return _error(400, "a stream has one prompt and n=1")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        [request], sent, made = requests, 0, None
        try:
            async with aclosing(self.fleet.stream(request, deadline=self.timeout, routing=routing)) as parts:
                async for made in parts:
                    if not response.prepared:  # an error before the first token still has its own status
                        await response.prepare(http)
                    if len(made.output_ids) > sent:
                        await _send(response, chunk(body, self.model, made, sent))
                        sent = len(made.output_ids)
        except MillraceError as error:
            if not response.prepared:
                raise
            await _send(response, _described(500, str(error)))
            return response
        assert made is not None, "a stream has a last item"
        await _send(response, last_chunk(body, self.model, request, made))
        await response.write(b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Wait while the server is paused, then count a request while it runs."""
        async with asyncio.timeout(self.timeout):
            await self.open.wait()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            async with self.ended:
                self.ended.notify_all()


async def _read(http: web.Request, kind: type[B]) -> B:
    """Return the body of a request. Raises DataError if it is not of this kind."""
    try:
        return kind.model_validate_json(await http.read())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where or 'the body'}: {first['msg']}") from None


async def _send(response: web.StreamResponse, event: object) -> None:
    await response.write(b"data: " + orjson.dumps(event) + b"\n\n")


def _error(status: int, message: str) -> web.Response:
    return reply(_described(status, message), status)


def _described(status: int, message: str) -> dict[str, object]:
    """Return an error in the form of OpenAI's API."""
    return {"error": {"message": message, "type": "error", "param": None, "code": status}}
