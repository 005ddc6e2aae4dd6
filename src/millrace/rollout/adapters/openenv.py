"""Environments of OpenEnv servers: a WebSocket session of the server for each episode."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import orjson

from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.calls import Calls
from millrace.rollout.environment import EnvironmentKind
from millrace.rollout.step import Action, Step

START_TIMEOUT = 10.0  # seconds until a server has said what its actions are
CLOSING = aiohttp.ClientWSTimeout(ws_close=5.0)  # seconds until a session that is closed counts as closed


@asynccontextmanager
async def opened(config: EnvironmentConfig, calls: Calls) -> AsyncIterator[EnvironmentKind]:
    """Yield the environment of an OpenEnv server, whose sessions must end in the block.

    Raises ConfigError, which names the server, if it does not answer.
    """
    url = (config.openenv or "").rstrip("/")
    async with aiohttp.ClientSession() as http:
        try:
            timeout = aiohttp.ClientTimeout(START_TIMEOUT)
            async with http.get(f"{url}/schema", timeout=timeout, raise_for_status=True) as answer:
                field = required_field((await answer.json())["action"])
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, AttributeError) as error:
            reason = str(error) or f"it did not answer within {START_TIMEOUT:g} s"
            raise ConfigError(f"environment: no OpenEnv server answers at {url}: {reason}") from error
        make = partial(OpenEnvEpisode, http, url, field, config.arguments)
        yield EnvironmentKind(f"{url} (OpenEnv)", "", make, True, (), config.timeout, calls)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of an action. is_text: it holds a string, so a number in the model's turn stays text."""

    name: str
    is_text: bool


def required_field(schema: Mapping[str, Any]) -> Field | None:
    """Return the one field that the JSON schema of actions requires, which a plain text becomes; None if it is not one
    field."""
    match schema.get("required", []):
        case [str() as name]:
            return Field(name, schema.get("properties", {}).get(name, {}).get("type") == "string")
    return None


class OpenEnvEpisode:
    """One session of an OpenEnv server.

    field: the field of an action that a plain text becomes; None if an action must be a JSON object.
    """

    def __init__(
        self, http: aiohttp.ClientSession, url: str, field: Field | None, arguments: Mapping[str, object]
    ) -> None:
        self._http = http
        self._url = url
        self._field = field
        self._arguments = arguments
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def reset(self, row: Mapping[str, Any]) -> str:
        """Open a session, and return the first observation."""
        try:
            self._socket = await self._http.ws_connect(f"{self._url}/ws", max_msg_size=0, timeout=CLOSING)
        except aiohttp.ClientError as error:
            raise UserCodeError(f"no session can be opened: {error}") from error
        return _text((await self._ask("reset", {**self._arguments, **row}))["observation"])

    async def step(self, action: Action) -> Step:
        """Send an action. One that the server can't read is answered with its message."""
        try:
            told = await self._ask("step", self._read(action.text))
        except _UnreadableAction as error:
            return Step(str(error))
        return Step(_text(told["observation"]), told["reward"] or 0.0, bool(told["done"]))

    async def close(self) -> None:
        """End the session."""
        if self._socket is not None:
            await self._socket.close()

    def _read(self, text: str) -> dict[str, object]:
        """Return the action in a text: a JSON object, or the value of an action's only field."""
        text = text.strip()
        if text.startswith("```") and text.endswith("```"):
            text = text.removesuffix("```").partition("\n")[2].strip()
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
        if isinstance(value, dict):
            return value
        if self._field is None:
            raise _UnreadableAction("An action is a JSON object.")
        return {self._field.name: text if self._field.is_text else value}

    async def _ask(self, kind: str, data: Mapping[str, object]) -> dict[str, Any]:
        """Send a message and return the data of its answer. Raises UserCodeError, and _UnreadableAction."""
        assert self._socket is not None
        message = orjson.dumps({"type": kind, "data": data}).decode()
        try:
            await self._socket.send_str(message)
            answer = orjson.loads(await self._socket.receive_str())
        except (aiohttp.ClientError, TypeError, OSError) as error:
            code = self._socket.close_code
            raise UserCodeError(f"the server closed the connection (WebSocket code {code})") from error
        told = answer["data"]
        if answer["type"] != "error":
            return dict(told)
        if kind == "step" and told.get("code") == "VALIDATION_ERROR":
            reasons = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in told["errors"])
            raise _UnreadableAction(f"This is no action: {'; '.join(reasons)}")
        raise UserCodeError(f"{told.get('code')}: {' '.join(told['message'].split())}")


class _UnreadableAction(Exception):
    """A turn of the model is no action."""


def _text(observation: Mapping[str, object]) -> str:
    """Return an observation as text: that of its only field, or JSON."""
    content = {name: value for name, value in observation.items() if name != "metadata"}
    match list(content.values()):
        case [str() as text] if text:
            return text
    return orjson.dumps(content).decode()
