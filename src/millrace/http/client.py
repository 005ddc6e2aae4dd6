"""An async HTTP client for one server, with pooled connections, a deadline on every call, and errors that name the
engine.

Data calls (generate) and control calls (all others) use separate connection pools, so a pause never queues behind a
thousand generates. A call is retried only if the caller says that repeating it is safe, or if this process could not
open a connection for it: then nothing was sent. The client ignores the proxy variables of the environment.
"""

import asyncio
import errno
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import aiohttp
import orjson
from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from millrace.errors import ConfigError, EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable, LocalError
from millrace.http.line import Line
from millrace.http.local import data_socket, lacking

# uvicorn, which serves the stock engines, closes an idle connection after 5 s. A client that keeps one for longer
# eventually sends a request into a connection that is being closed, and can't know whether it arrived. On a busy host,
# it may write seconds after it has taken the connection.
KEEPALIVE_SECONDS = 1.0
JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
RETRY_PAUSES = (0.05, 0.2, 0.8)
ERROR_TEXT_LIMIT = 500
LARGEST_PORT = 65535
# Limit for one DNS lookup. Without it, a slow name service would use up the call's whole deadline, and the engine would
# be blamed for not answering.
RESOLVE_SECONDS = 3.0
RESOLVE_PATIENCE = 10.0  # seconds that a data call retries while its host name can't be resolved
# Connections for control calls. They are limited because an aborted step sends thousands of aborts at once.
MOST_CONTROLS = 64
WAIT_MARGIN = 0.05  # a queued call gives up this many seconds before its deadline, so that its caller gets the reason
WARN_SECONDS = 60.0  # seconds between two warnings that calls are waiting

Method = Literal["GET", "POST", "DELETE"]
logger = logging.getLogger(__name__)


class HttpClient:
    """One async HTTP client for the server at `url`.

        client = HttpClient("engine-0", "http://127.0.0.1:30000")
        info = await client.control("GET", "/server_info", deadline=5.0)
        await client.close()

    Error messages call the server `name`. `api_key` authorizes data calls and queries (GET). `admin_key` authorizes
    the other control calls, and defaults to `api_key`. Sessions are created on first use, in the event loop that uses
    them, and `close` closes them. Raises ConfigError if `url` is not the URL of a server.
    """

    def __init__(self, name: str, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self.name = name
        self._url = server_url(url)
        self._paths: dict[str, URL] = {}
        self._keys = {"data": api_key, "query": api_key, "control": admin_key or api_key}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._line = Line()  # data calls that wait for a connection
        self._trying = 0  # number of data calls that have a connection or are trying to get one
        self._lacking: LocalError | None = None  # why the last connection could not be opened
        self._warned_at = -WARN_SECONDS
        self._closed = False

    async def generate(
        self, path: str, body: object, *, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Any:
        """POST a data call and return its JSON response. The deadline is in seconds.

        A data call that was sent is never repeated, since the server may have started it. The call waits while this
        process can't open another connection.

        Raises EngineTimeout, EngineUnreachable, EngineRefused (4xx), EngineFailed (5xx, or a response that is not
        JSON), or LocalError if this process could not send the call before the deadline.
        """
        return await self._call("data", "POST", path, body, deadline, headers)

    async def control(
        self, method: Method, path: str, body: object = None, *, deadline: float, repeatable: bool = False
    ) -> Any:
        """Make a control call and return its response. The deadline is in seconds.

        A JSON response is returned as its value, other text as a string, and an empty one as None. If `repeatable` is
        true, a call whose connection breaks is retried while the deadline allows. Raises the same errors as
        `generate`.
        """
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
        """POST a data call whose response is server-sent events, and yield the JSON of each event until `[DONE]`.

        Raises the same errors as `generate`.
        """
        async with self._answer("data", "POST", path, body, deadline) as response:
            if response.status != 200:
                self._parse(path, response.status, await response.read())
            async for line in _lines(response.content):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield self._decode(path, data)
        raise EngineUnreachable(self.name, f"the stream of {path} broke off before its end", sent=True)

    async def close(self) -> None:
        """Close the connections. Later calls raise LocalError."""
        self._closed = True
        self._line.close()
        for channel, session in list(self._sessions.items()):
            await session.close()
            self._sessions.pop(channel, None)  # only now: if this is cancelled, the next close closes the rest

    async def _call(
        self,
        channel: str,
        method: Method,
        path: str,
        body: object,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        async with self._answer(channel, method, path, body, deadline, headers) as response:
            data = await response.read()
            if response.status >= 500:
                response.close()  # vLLM silently closes such a connection, which would break the next request
            if response.status == 200 and not response.headers.get("Content-Type", "").startswith("application/json"):
                return data.decode(errors="replace") or None
            return self._parse(path, response.status, data)

    @asynccontextmanager
    async def _answer(
        self,
        channel: str,
        method: Method,
        path: str,
        body: object,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a call and yield its response as soon as the headers are received.

        Errors while the block reads the response are translated to Millrace's errors, too.
        """
        response = await self._send(channel, method, path, body, deadline, headers)
        try:
            async with response:
                yield response
        except (aiohttp.ClientError, TimeoutError, MemoryError) as error:
            raise self._translate(path, error, deadline) from error
        finally:
            self._leave(channel, free=True)

    async def _send(
        self,
        channel: str,
        method: Method,
        path: str,
        body: object,
        deadline: float,
        headers: Mapping[str, str] | None,
    ) -> aiohttp.ClientResponse:
        """Send a call, and retry if this process lacks a resource to open a connection: nothing was sent then.

        A data call is retried until its deadline, each time another data call has ended. A control call is retried a
        few times.
        """
        begun = time.monotonic()
        end = begun + max(deadline, 0.001)
        data = None if body is None else self._encode(path, body)
        pauses = iter(RETRY_PAUSES)
        if channel == "data" and self._line:
            await self._wait(begun, end, again=False)
        while True:
            try:
                return await self._attempt(channel, method, path, data, end - time.monotonic(), headers)
            except LocalError as error:
                if error.sent or self._closed:
                    raise
                if channel == "data":
                    self._lacking = error
                    await self._wait(begun, end, again=True)
                elif (pause := next(pauses, None)) is None or time.monotonic() + pause >= end:
                    raise
                else:
                    await asyncio.sleep(pause)

    async def _attempt(
        self,
        channel: str,
        method: Method,
        path: str,
        data: bytes | None,
        seconds: float,
        headers: Mapping[str, str] | None,
    ) -> aiohttp.ClientResponse:
        url = self._paths.get(path)
        if url is None:
            url = self._paths[path] = self._url.join(URL(path))
        self._trying += channel == "data"
        try:
            timeout = aiohttp.ClientTimeout(total=max(seconds, 0.001))
            return await self._session(channel).request(method, url, data=data, headers=headers, timeout=timeout)
        except (aiohttp.ClientError, TimeoutError, MemoryError) as error:
            failure = self._translate(path, error, seconds)
            # A call that could not open a connection frees none for the next call.
            self._leave(channel, free=not isinstance(failure, LocalError))
            raise failure from error
        except BaseException:
            self._leave(channel, free=True)
            raise

    def _leave(self, channel: str, *, free: bool) -> None:
        """Count a call that has ended. `free`: the call had a connection, so the next call in line may try."""
        if channel == "data":
            self._trying -= 1
            if free:
                self._line.admit()

    async def _wait(self, begun: float, end: float, *, again: bool) -> None:
        """Wait in line for the next try.

        Raises LocalError shortly before `end` (in time.monotonic()), or earlier if the host can't be resolved.
        """
        error = self._lacking
        assert error is not None
        if isinstance(error.__cause__, aiohttp.ClientConnectorDNSError):
            end = min(end, begun + RESOLVE_PATIENCE)
        now = time.monotonic()
        if now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            logger.warning("requests wait: %s", error)
        try:
            await self._line.wait(end - WAIT_MARGIN - now, again=again)
        except TimeoutError:
            raise LocalError(self.name, error.reason) from error

    def _encode(self, path: str, body: object) -> bytes:
        try:
            return orjson.dumps(body, option=JSON)
        except orjson.JSONEncodeError as error:
            raise EngineRefused(self.name, f"the body for {path} can't be written as JSON: {error}") from error

    def _session(self, channel: str) -> aiohttp.ClientSession:
        if self._closed:
            raise LocalError(self.name, "its HTTP client is closed")
        session = self._sessions.get(channel)
        if session is None:
            headers = {"Content-Type": "application/json"}
            if key := self._keys[channel]:
                headers["Authorization"] = f"Bearer {key}"
            session = self._sessions[channel] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0 if channel == "data" else MOST_CONTROLS,
                    keepalive_timeout=KEEPALIVE_SECONDS,
                    resolver=_Resolver(),
                    socket_factory=self._data_socket if channel == "data" else None,
                ),
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return session

    def _parse(self, path: str, status: int, data: bytes) -> Any:
        if status in (200, 202):
            return self._decode(path, data)
        text = _told(data)[:ERROR_TEXT_LIMIT]
        if 400 <= status < 500:
            raise EngineRefused(self.name, f"{path} was refused with HTTP {status}: {text}")
        raise EngineFailed(self.name, f"{path} failed with HTTP {status}: {text}")

    def _decode(self, path: str, data: bytes) -> Any:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            text = data.decode(errors="replace")[:ERROR_TEXT_LIMIT]
            raise EngineFailed(self.name, f"the response of {path} is not JSON: {text}") from None

    def _data_socket(self, address: AddrInfoType) -> socket.socket:
        """Create the socket of a data call. A single call may use the reserved file descriptors, so that at least one
        call always makes progress."""
        make = data_socket if self._trying > 1 else socket.socket
        return make(*address[:3])

    def _translate(self, path: str, error: Exception, seconds: float) -> Exception:
        refused = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
        sent = refused is None
        if self._closed:
            return LocalError(self.name, "its HTTP client is closed", sent=sent)
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            reason = f"the host of {self._url.origin()} can't be resolved: {error.os_error.strerror or error.os_error}"
            return LocalError(self.name, reason)
        if (lack := lacking(refused or error)) is not None:
            return LocalError(self.name, f"no connection to {self._url.origin()}: {lack}", sent=sent)
        if isinstance(error, TimeoutError):
            return EngineTimeout(self.name, f"{path} did not answer within {seconds:.1f} s")
        if refused is None:
            return EngineUnreachable(self.name, f"the connection for {path} broke off: {error!r}", sent=True)
        return EngineUnreachable(self.name, self._no_connection(refused), sent=False)

    def _no_connection(self, error: OSError) -> str:
        at = self._url.origin()
        refused = error.errno == errno.ECONNREFUSED
        return f"no server listens at {at}" if refused else f"no connection to {at}: {error}"


class _Resolver(AbstractResolver):
    """The host's name resolver, with a time limit of RESOLVE_SECONDS."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolver.resolve(host, port, family)
        except TimeoutError:
            raise socket.gaierror(
                socket.EAI_AGAIN, f"the name service did not answer within {RESOLVE_SECONDS:g} s"
            ) from None

    async def close(self) -> None:
        await self._resolver.close()


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, of any length. Each byte is searched and copied once.

    aiohttp's own line iterator has a length limit, and one event holds a whole generation.
    """
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            parts.append(line)
            yield b"".join(parts)
            parts.clear()
        parts.append(rest)
    yield b"".join(parts)


def _told(body: bytes) -> str:
    """Return what the body of a refusal says: its message, if it is JSON that has one as servers write it."""
    text = body.decode(errors="replace").strip()
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return text
    for part in (parsed, parsed.get("error")) if isinstance(parsed, dict) else ():
        if isinstance(part, dict) and isinstance(message := part.get("message"), str) and message:
            return message
    return text


def server_url(url: str) -> URL:
    """Return the parsed URL of a server. Raises ConfigError, with a hint, if `url` is not an HTTP URL with a host."""
    if (parsed := _parsed(url)) is not None:
        return parsed
    meant = "http://" + re.sub(r"^[a-z]*:?/+", "", url)
    raise ConfigError(f"{url!r} is not a server's URL; write {meant if _parsed(meant) else 'http://HOST:PORT'}")


def _parsed(url: str) -> URL | None:
    try:
        parsed = URL(url)
    except ValueError:  # for example, the port is not a number
        return None
    sound = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 0) <= LARGEST_PORT
    return parsed if sound else None
