"""The HTTP server of the gateway: the routes of agents, and those of trainers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from aiohttp import web

from millrace.config.gateway import GatewayConfig
from millrace.errors import ArgumentError, DataError, EngineRefused, EngineTimeout, MillraceError, NoEngineError
from millrace.fleet.client import FleetClient
from millrace.fleet.owner import checked_key
from millrace.gateway.call import ModelCall
from millrace.gateway.control import ControlRoutes, errors_as_json
from millrace.gateway.episode import Episode
from millrace.gateway.format import TurnFormat
from millrace.gateway.gateway import Gateway
from millrace.gateway.protocols.anthropic import AnthropicMessages
from millrace.gateway.protocols.base import AgentProtocol, RequestError, Stream
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.protocols.completions import Completions
from millrace.gateway.protocols.responses import Responses
from millrace.gateway.turn import Turn
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.launch.ports import url_of
from millrace.serve.server import bind

S = TypeVar("S", bound=AgentProtocol)

log = logging.getLogger(__name__)

LARGEST_BODY = 64 * 2**20  # bytes: a conversation of some millions of tokens, or some images
PATIENCE = 5.0  # seconds without a token after which a stream sends a ping
ANTHROPIC = AnthropicMessages()
PROTOCOLS: Mapping[str, AgentProtocol] = {
    "/chat/completions": ChatCompletions(),
    "/responses": Responses(),
    "/messages": ANTHROPIC,
    "/completions": Completions(),
}


@asynccontextmanager
async def serve_gateway(
    fleet: FleetClient, turns: TurnFormat, *, key: str, config: GatewayConfig | None = None
) -> AsyncIterator[Gateway]:
    """Serve a fleet to agents while the block runs, and yield the gateway, whose `url` is where it is served.

    Args:
        fleet: The fleet, or a follower.
        turns: The model's format, from `load_format`.
        key: The key that the control routes ask for. Agents have secrets of their own, one for each episode.
        config: The settings.

    Raises:
        ConfigError: The port can't be bound, or the folder can't be written.
        ArgumentError: The key is empty, or an HTTP header can't carry it.
        DataError: A file in the folder is damaged.

    Example:

        async with serve_gateway(fleet, load_format(folder), key=key) as gateway:
            async with gateway.episode() as episode:
                await run_agent(episode.base_url, episode.api_key)
            samples = episode.samples()
    """
    config = config or GatewayConfig()
    gateway = Gateway(fleet, turns, config)
    routes, control = AgentRoutes(gateway), ControlRoutes(gateway, checked_key(key))
    app = web.Application(client_max_size=LARGEST_BODY, middlewares=[errors_as_json])
    app.add_routes([*routes.routes(), *control.routes()])
    try:
        with bind(config.host, config.port, "the gateway", "gateway.port") as sock:
            gateway.url = url_of(*sock.getsockname()[:2])
            async with serving(app, sock, cancel=True):  # a handler is cancelled when its agent goes away
                yield gateway
    finally:
        await gateway.close()


@dataclass(slots=True)
class AgentRoutes:
    """The routes that agents use, below `/v1`, below `/e/SECRET/v1`, and below `/e/SECRET`."""

    gateway: Gateway
    started: int = field(default_factory=lambda: int(time.time()))

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        found = [web.get("/", self._alive)]
        for prefix in ("/v1", "/e/{secret}/v1", "/e/{secret}"):
            found.append(web.get(f"{prefix}/models", self._models))
            found.append(web.get(f"{prefix}/models/{{model:.+}}", self._model))
            for path, spoken in PROTOCOLS.items():
                found.append(web.post(prefix + path, self._handler(spoken, self._answer)))
            found.append(web.post(f"{prefix}/messages/count_tokens", self._handler(ANTHROPIC, self._count)))
        found.append(web.get("/e/{secret}", self._alive))
        found.append(web.get("/e/{secret}/", self._alive))
        return found

    def _handler(
        self, spoken: S, answer: Callable[[web.Request, S], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(http: web.Request) -> web.StreamResponse:
            try:
                return await answer(http, spoken)
            except RequestError as error:
                return reply(spoken.error(error), error.status)
            except MillraceError as error:
                found = described(error)
                return reply(spoken.error(found), found.status)
            except (ConnectionError, web.HTTPException):
                raise
            except Exception:
                log.exception("a request failed")
                return reply(spoken.error(INTERNAL), INTERNAL.status)

        return handle

    async def _alive(self, http: web.Request) -> web.Response:  # noqa: ARG002
        """Answer the probes that some agents send first."""
        return web.Response()

    async def _models(self, http: web.Request) -> web.Response:
        try:
            self._episode(http)
        except RequestError as error:
            return reply({"error": {"message": str(error), "type": "authentication_error", "code": error.code}}, 401)
        return reply({"object": "list", "data": [self._card(self.gateway.engines.config.model)], "has_more": False})

    def _episode(self, http: web.Request) -> Episode:
        """Return the episode of a request. Raises RequestError if there is none, or its headers name two."""
        found = {episode.id: episode for key in secrets_of(http) if (episode := self.gateway.find(key)) is not None}
        if len(found) != 1:
            message = "the headers have different keys" if found else NO_EPISODE
            raise RequestError(message, status=401, code="no_episode")
        return next(iter(found.values()))

    async def _model(self, http: web.Request) -> web.Response:
        return reply(self._card(http.match_info["model"]))

    def _card(self, name: str) -> dict[str, object]:
        length = self.gateway.engines.fleet.context_length
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": self.started,
            "owned_by": "millrace",
            "max_model_len": length,
        }

    async def _count(self, http: web.Request, spoken: AnthropicMessages) -> web.StreamResponse:
        """Answer how many tokens a prompt has."""
        episode = self._episode(http)
        tokens = episode.count_tokens(spoken.read_prompt(await body_of(http), http.headers))
        return reply(spoken.counted(tokens))

    async def _answer(self, http: web.Request, spoken: AgentProtocol) -> web.StreamResponse:
        episode = self._episode(http)
        call = spoken.read(await body_of(http), http.headers)
        turn = await episode.ask(call)
        try:
            if call.stream:
                return await self._stream(http, spoken, episode, call, turn)
            answer = await turn.answer()
            response = reply(spoken.answer(call, answer))
            await response.prepare(http)
            await response.write_eof()
            episode.delivered(turn)
            return response
        except (asyncio.CancelledError, ConnectionError):
            episode.abandon(turn)
            raise
        except Exception:
            episode.drop(turn)
            raise

    async def _stream(
        self, http: web.Request, spoken: AgentProtocol, episode: Episode, call: ModelCall, turn: Turn
    ) -> web.StreamResponse:
        """Answer with server-sent events. Errors before the first one have their own status."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        events: Stream = spoken.stream(call, self.gateway.engines.config.model)

        async def begun() -> None:
            if not response.prepared:
                await response.prepare(http)
                await response.write(events.begin(turn.id, turn.created))

        try:
            async with aclosing(turn.follow(PATIENCE)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    await begun()
                    await response.write(events.ping() if delta is None else events.delta(delta))
        except (MillraceError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if not response.prepared:
                raise
            episode.drop(turn)
            if not isinstance(error, MillraceError):
                log.exception("a request failed")
            await response.write(events.error(described(error) if isinstance(error, MillraceError) else INTERNAL))
            await response.write_eof()
            return response
        await begun()
        await response.write(events.end(await turn.answer()))
        await response.write_eof()
        episode.delivered(turn)
        return response


NO_EPISODE = "no episode has this key; open one with POST /episodes"
INTERNAL = RequestError("the gateway failed; its log says more", status=500, code="internal_error")


def secrets_of(http: web.Request) -> set[str]:
    """Return the secrets of a request: the one in its path, or else those in its headers."""
    if (secret := http.match_info.get("secret")) is not None:
        return {secret}
    bearers = [one.partition(" ") for one in http.headers.getall("Authorization", ())]
    keys = [key.strip() for scheme, _, key in bearers if scheme.lower() == "bearer"]
    return {*keys, *http.headers.getall("x-api-key", ()), *http.headers.getall("api-key", ())}


async def body_of(http: web.Request) -> Mapping[str, Any]:
    """Return the body of a request, a JSON object. Raises RequestError."""
    try:
        body = orjson.loads(await http.read())
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestError(f"the body has more than {LARGEST_BODY} bytes", status=413, code="too_large") from error
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    return body


def described(error: MillraceError) -> RequestError:
    """Return an error as agents get it."""
    match error:
        case RequestError():
            return error
        case ArgumentError() | DataError() | EngineRefused():
            return RequestError(str(error))
        case NoEngineError() | EngineTimeout():
            return RequestError(str(error), status=503, code="no_engine")
    log.warning("a request failed: %s", error)
    return RequestError(str(error), status=500, code="engine_failed")
