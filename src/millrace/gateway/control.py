"""The control routes of the gateway, which ask for its key: episodes are opened, finished, read and deleted."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from millrace.config.explain import nearest
from millrace.errors import ArgumentError, DataError, MillraceError, NoEngineError, PublishError
from millrace.gateway.episode import Episode
from millrace.gateway.gateway import Gateway
from millrace.gateway.samples import GatewaySample
from millrace.gateway.turn import EpisodeClosed
from millrace.http.auth import has_key
from millrace.http.replies import reply
from millrace.serve.preempting import preempt
from millrace.serve.publishing import publish_folder

B = TypeVar("B", bound=BaseModel)


class OpenBody(BaseModel):
    """The body of `POST /episodes`."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, object] = Field(default_factory=dict)


class FinishBody(BaseModel):
    """The body of `POST /episodes/ID/finish`."""

    model_config = ConfigDict(extra="forbid")

    reward: FiniteFloat | None = None
    parts: dict[str, FiniteFloat] = Field(default_factory=dict)


class UpdateBody(BaseModel):
    """The body of `POST /update_weights`."""

    model_config = ConfigDict(extra="forbid")

    weight_dir: Path


class PreemptBody(BaseModel):
    """The body of `POST /preempt`. engine: its name; host: its address, for all engines there."""

    model_config = ConfigDict(extra="forbid")

    engine: str | None = None
    host: str | None = None
    deadline: Annotated[FiniteFloat, Field(gt=0)] = 30.0


@dataclass(frozen=True, slots=True)
class ControlRoutes:
    """The handlers."""

    gateway: Gateway
    key: str

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.post("/episodes", self._with_key(self._open)),
            web.get("/episodes", self._with_key(self._list)),
            web.get("/episodes/{id}", self._with_key(self._show)),
            web.get("/episodes/{id}/samples", self._with_key(self._samples)),
            web.post("/episodes/{id}/finish", self._with_key(self._finish)),
            web.delete("/episodes/{id}", self._with_key(self._delete)),
            web.post("/update_weights", self._with_key(self._update_weights)),
            web.post("/preempt", self._with_key(self._preempt)),
        ]

    def _with_key(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(http: web.Request) -> web.Response:
            if not has_key(http.headers.get("Authorization"), [self.key]):
                return _error(401, "this route needs the gateway's key, as `Authorization: Bearer KEY`")
            try:
                return await handler(http)
            except EpisodeClosed as error:
                return _error(error.status, str(error))
            except (ArgumentError, PublishError, DataError) as error:
                return _error(400, str(error))

            except MillraceError as error:
                return _error(500, str(error))
            except web.HTTPRequestEntityTooLarge as error:
                return _error(error.status, "the body is too large")

        return handle

    async def _open(self, http: web.Request) -> web.Response:
        body = await _read(http, OpenBody)
        opened = self.gateway.open_episode(body.metadata)
        return reply(
            {"id": opened.id, "base_url": opened.base_url, "api_key": opened.api_key, "headers": opened.headers}
        )

    async def _list(self, http: web.Request) -> web.Response:  # noqa: ARG002
        return reply({"episodes": [view(episode) for episode in self.gateway.episodes.values()]})

    async def _show(self, http: web.Request) -> web.Response:
        return reply(view(self._episode(http)))

    async def _samples(self, http: web.Request) -> web.Response:
        episode = self._episode(http)
        samples = [sample_view(sample) for sample in episode.samples()]
        found = {"reward": episode.reward, "parts": episode.parts, "samples": samples}
        body = orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)
        return web.Response(body=body, content_type="application/json")

    async def _finish(self, http: web.Request) -> web.Response:
        body = await _read(http, FinishBody)
        episode = self._episode(http)
        await episode.close(body.reward, body.parts)
        return reply(view(episode))

    async def _delete(self, http: web.Request) -> web.Response:
        self._episode(http)
        await self.gateway.delete(http.match_info["id"])
        return reply({"deleted": http.match_info["id"]})

    async def _update_weights(self, http: web.Request) -> web.Response:
        """Publish the weights of a folder in Hugging Face's format as the next version."""
        body = await _read(http, UpdateBody)
        return reply(await publish_folder(self.gateway.engines.fleet, body.weight_dir))

    async def _preempt(self, http: web.Request) -> web.Response:
        """Remove the engines whose host goes away, and return their names when they are out."""
        body = await _read(http, PreemptBody)
        try:
            return reply(await preempt(self.gateway.engines.fleet, body.engine, body.host, body.deadline))
        except NoEngineError as error:
            return _error(404, str(error))

    def _episode(self, http: web.Request) -> Episode:
        episode = self.gateway.episodes.get(http.match_info["id"])
        if episode is None:
            raise web.HTTPNotFound(reason="there is no such episode")
        return episode


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer an unknown path, method or episode as the other errors are answered."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        return _error(405, f"{request.path} takes {', '.join(sorted(error.allowed_methods))}, not {request.method}")
    except web.HTTPNotFound as error:
        no_route = f"there is no route {request.path}; docs/gateway.md lists the routes"
        return _error(404, no_route if error.reason == "Not Found" else error.reason)


async def _read(http: web.Request, form: type[B]) -> B:
    """Return the body of a request; an empty one has the defaults. Raises DataError."""
    try:
        return form.model_validate_json(await http.read() or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(where, list(form.model_fields)) or f"valid: {', '.join(form.model_fields)}"
            raise DataError(f"unknown field {where}; {hint}") from error
        raise DataError(f"{where or 'the body'}: {first['msg']}") from error


def view(episode: Episode) -> dict[str, object]:
    """Return an episode as JSON values."""
    tree = episode.tree
    return {
        "id": episode.id,
        "metadata": episode.metadata,
        "created": episode.created,
        "status": "closed" if episode.closed else "open",
        "reward": episode.reward,
        "parts": episode.parts,
        "running": sum(not turn.abandoned for turn in episode.turns),
        "generations": len(tree.nodes),
        "undelivered": tree.undelivered,
        "output_tokens": sum(len(node.output_ids) for node in tree.nodes),
        "counts": dict(sorted(episode.counts.items())),
    }


def sample_view(sample: GatewaySample) -> Mapping[str, object]:
    """Return a sample as JSON values and arrays."""
    episode = sample.episode
    return {
        "token_ids": episode.token_ids,
        "loss_mask": episode.loss_mask.astype("uint8"),
        "logprobs": episode.logprobs,
        "version_spans": [[span.version, span.start, span.end] for span in episode.version_spans],
        "finish": sample.finish,
        "nodes": sample.nodes,
        "reasons": {str(number): reason for number, reason in sample.reasons.items()},
        "superseded": sample.superseded,
        "temperatures": sample.temperatures,
        "messages": [_without_images(message) for message in episode.messages],
    }


def _without_images(message: Mapping[str, object]) -> Mapping[str, object]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in content]}


def _error(status: int, message: str) -> web.Response:
    return reply({"error": {"message": message, "code": status}}, status)
