"""One server's HTTP API: pooled connections, a deadline on every call, and errors that name the engine.

Data calls (generate) and control calls (all others) have connections of their own, so that a pause never queues behind
a thousand generates. A call is repeated only when the caller says that repeating it is safe.
"""

import asyncio
import errno
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import aiohttp
import orjson
from yarl import URL

from millrace.errors import ConfigError, EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable

# uvicorn, which serves the stock engines, closes an idle connection after 5 s. A client that keeps one for longer will
# sooner or later send a request into a connection that is being closed, and can't know whether it arrived.
KEEPALIVE_SECONDS = 4.0
JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
RETRY_PAUSES = (0.05, 0.2, 0.8)
ERROR_TEXT_LIMIT = 500
LARGEST_PORT = 65535

Method = Literal["GET", "POST", "DELETE"]


class HttpClient:
    """Calls to the server at `url`, which errors call `name`.

    api_key opens the data calls and the questions (GET), admin_key the control calls (it defaults to api_key). Sessions
    are made on first use, in the event loop that uses them; `close` gives them back. Raises ConfigError where `url` is
    not a server's.
    """

    def __init__(self, name: str, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self.name = name
        self._url = server_url(url)
        self._paths: dict[str, URL] = {}
        self._keys = {"data": api_key, "query": api_key, "control": admin_key or api_key}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._closed = False

    async def generate(
        self, path: str, body: object, *, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Any:
        """POSTs a data call and returns the JSON that comes back. Never repeated: the server may have begun.

        Raises EngineTimeout, EngineUnreachable, EngineRefused (4xx) or EngineFailed (5xx, or no JSON).
        """
        return await self._call("data", "POST", path, body, deadline, headers)

    async def control(
        self, method: Method, path: str, body: object = None, *, deadline: float, repeatable: bool = False
    ) -> Any:
        """A control call. JSON comes back as its value, other text as a string, nothing as None. With `repeatable` a
        broken connection is tried again while the deadline allows. Raises what `generate` raises."""
        end = time.monotonic() + deadline
        channel = "query" if method == "GET" else "control"
        for pause in RETRY_PAUSES if repeatable else ():
            try:
                return await self._call(channel, method, path, body, end - time.monotonic())
            except EngineUnreachable:
                if time.monotonic() + pause >= end:
                    raise
                await asyncio.sleep(pause)
        return await self._call(channel, method, path, body, end - time.monotonic())

    async def events(self, path: str, body: object, *, deadline: float) -> AsyncIterator[Any]:
        """POSTs a data call that answers with server-sent events; yields the JSON of each until `[DONE]`."""
        try:
            async with self._post("data", "POST", path, body, deadline) as response:
                if response.status != 200:
                    self._parse(path, response.status, await response.read())
                async for line in _lines(response.content):
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield self._decode(path, data)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(path, error, deadline) from error
        raise EngineUnreachable(self.name, f"the stream of {path} broke off before its end", sent=True)

    async def close(self) -> None:
        """Gives the connections back; calls after this raise EngineUnreachable."""
        self._closed = True
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            await session.close()

    async def _call(
        self,
        channel: str,
        method: Method,
        path: str,
        body: object,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        try:
            async with self._post(channel, method, path, body, deadline, headers) as response:
                data = await response.read()
                if response.status >= 500:
                    response.close()  # vLLM closes such a connection without a word, under the next request
                if response.status == 200 and not response.headers.get("Content-Type", "").startswith(
                    "application/json"
                ):
                    return data.decode(errors="replace") or None
                return self._parse(path, response.status, data)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(path, error, deadline) from error

    def _post(
        self,
        channel: str,
        method: Method,
        path: str,
        body: object,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> "aiohttp.client._RequestContextManager":
        url = self._paths.get(path)
        if url is None:
            url = self._paths[path] = self._url.join(URL(path))
        return self._session(channel).request(
            method,
            url,
            data=None if body is None else self._encode(path, body),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=max(deadline, 0.001)),
        )

    def _encode(self, path: str, body: object) -> bytes:
        try:
            return orjson.dumps(body, option=JSON)
        except orjson.JSONEncodeError as error:
            raise EngineRefused(self.name, f"the body for {path} can't be written as JSON: {error}") from error

    def _session(self, channel: str) -> aiohttp.ClientSession:
        if self._closed:
            raise EngineUnreachable(self.name, "its client was closed", sent=False)
        session = self._sessions.get(channel)
        if session is None:
            headers = {"Content-Type": "application/json"}
            if key := self._keys[channel]:
                headers["Authorization"] = f"Bearer {key}"
            session = self._sessions[channel] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return session

    def _parse(self, path: str, status: int, data: bytes) -> Any:
        if status in (200, 202):
            return self._decode(path, data)
        text = data.decode(errors="replace").strip()[:ERROR_TEXT_LIMIT]
        if 400 <= status < 500:
            raise EngineRefused(self.name, f"{path} was refused with HTTP {status}: {text}")
        raise EngineFailed(self.name, f"{path} failed with HTTP {status}: {text}")

    def _decode(self, path: str, data: bytes) -> Any:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            text = data.decode(errors="replace")[:ERROR_TEXT_LIMIT]
            raise EngineFailed(self.name, f"{path} answered what is not JSON: {text}") from None

    def _translate(self, path: str, error: Exception, deadline: float) -> Exception:
        if isinstance(error, TimeoutError):
            return EngineTimeout(self.name, f"{path} did not answer within {deadline:.1f} s")
        if not isinstance(error, aiohttp.ClientConnectorError):
            return EngineUnreachable(self.name, f"the connection for {path} broke off: {error!r}", sent=True)
        return EngineUnreachable(self.name, self._no_connection(error), sent=False)

    def _no_connection(self, error: aiohttp.ClientConnectorError) -> str:
        at = self._url.origin()
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return f"the host of {at} is not known: {error.os_error.strerror}"
        if error.os_error.errno == errno.ECONNREFUSED:
            return f"nobody listens at {at}"
        return f"no connection to {at}: {error.os_error}"


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a stream, of any length; aiohttp's own have a limit, and one event has a whole answer in it. Each
    byte is searched and copied once."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            parts.append(line)
            yield b"".join(parts)
            parts.clear()
        parts.append(rest)
    yield b"".join(parts)


def server_url(url: str) -> URL:
    """Raises ConfigError where it is not the URL of a server, and says what to write."""
    if (parsed := _parsed(url)) is not None:
        return parsed
    meant = "http://" + re.sub(r"^[a-z]*:?/+", "", url)
    raise ConfigError(f"{url!r} is no server's URL; write {meant if _parsed(meant) else 'http://HOST:PORT'}")


def _parsed(url: str) -> URL | None:
    try:
        parsed = URL(url)
    except ValueError:  # such as a port that is no number
        return None
    sound = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 0) <= LARGEST_PORT
    return parsed if sound else None
