"""The HTTP client against a real server that misbehaves on request."""

import asyncio
import gc
import os
import resource
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from millrace.errors import ConfigError, EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable, LocalError
from millrace.http import HttpClient

LENGTHS = (1, 2**16 - 20, 2**16, 2**19 + 1, 2**24)  # around aiohttp's own limits, and far beyond


class Server:
    """Answers each path in its own way, and records the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.connections: set[tuple[str, int]] = set()
        self.release = asyncio.Event()
        self.drops = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path, request.headers.get("Authorization")))
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        match request.path:
            case "/echo":
                return web.json_response(await request.json())
            case "/text":
                return web.Response(text="flushed")
            case "/refuse":
                return web.json_response({"error": "no such thing"}, status=400)
            case "/refuse-as-openai":
                return web.json_response({"object": "error", "error": {"message": "too long", "code": 400}}, status=400)
            case "/fail":
                return web.Response(status=500, text="boom")
            case "/not-json":
                return web.Response(text="<html>", content_type="application/json")
            case "/hang":
                await self.release.wait()
                return web.json_response({})
            case "/drop":
                self.drops -= 1
                if self.drops >= 0:
                    request.transport.close()
                return web.json_response({"dropped": False})
            case "/long-events":
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                for length in LENGTHS:
                    await response.write(b'data: {"text": "' + b"x" * length + b'"}\r\n\r\n')
                await response.write(b"data: [DONE]\n\n")
                return response
            case "/events" | "/broken-events":
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                await response.write(b'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
                if request.path == "/events":
                    await response.write(b"data: [DONE]\n\n")
                return response
        raise AssertionError(request.path)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    state = Server()
    app = web.Application()
    app.router.add_route("*", "/{path}", state.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield state, f"http://127.0.0.1:{runner.addresses[0][1]}"
    state.release.set()
    await runner.cleanup()


@pytest.fixture
async def client(server: tuple[Server, str]) -> AsyncIterator[HttpClient]:
    client = HttpClient("stub", server[1], api_key="data-key", admin_key="control-key")
    yield client
    await client.close()


async def test_generating_and_asking_take_one_key_and_control_another(
    server: tuple[Server, str], client: HttpClient
) -> None:
    assert await client.generate("/echo", {"a": [1, 2]}, deadline=5) == {"a": [1, 2]}
    assert await client.control("POST", "/echo", {}, deadline=5) == {}
    assert await client.control("GET", "/text", deadline=5) == "flushed"
    assert [key for _, key in server[0].requests] == ["Bearer data-key", "Bearer control-key", "Bearer data-key"]


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("/refuse", EngineRefused, "stub.*HTTP 400.*no such thing"),
        ("/refuse-as-openai", EngineRefused, "stub.*HTTP 400: too long$"),
        ("/fail", EngineFailed, "stub.*HTTP 500.*boom"),
        ("/not-json", EngineFailed, "not JSON.*<html>"),
    ],
)
async def test_answers_that_are_errors_name_the_engine_and_the_reason(
    client: HttpClient, path: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await client.generate(path, {}, deadline=5)


async def test_every_call_has_a_deadline(client: HttpClient) -> None:
    for call in (client.generate("/hang", {}, deadline=0.2), client.control("POST", "/hang", {}, deadline=0.2)):
        started = time.monotonic()
        with pytest.raises(EngineTimeout, match="did not answer within 0.2 s"):
            await call
        assert time.monotonic() - started < 2


async def test_a_control_call_does_not_queue_behind_generates(server: tuple[Server, str], client: HttpClient) -> None:
    generates = [asyncio.create_task(client.generate("/hang", {}, deadline=10)) for _ in range(300)]
    async with asyncio.timeout(10):
        while len(server[0].requests) < 300:
            await asyncio.sleep(0.01)
    assert await client.control("POST", "/echo", {"now": True}, deadline=2) == {"now": True}
    server[0].release.set()
    await asyncio.gather(*generates)


async def test_connections_are_reused(server: tuple[Server, str], client: HttpClient) -> None:
    for _ in range(20):
        await client.generate("/echo", {}, deadline=5)
    assert len(server[0].connections) == 1


async def test_only_safe_requests_are_repeated(server: tuple[Server, str], client: HttpClient) -> None:
    server[0].drops = 2
    answer = await client.control("POST", "/drop", {}, deadline=5, repeatable=True)
    assert answer == {"dropped": False}
    assert len(server[0].requests) == 3

    for call in (client.control("POST", "/drop", {}, deadline=5), client.generate("/drop", {}, deadline=5)):
        server[0].requests.clear()
        server[0].drops = 1
        with pytest.raises(EngineUnreachable) as caught:
            await call
        assert caught.value.sent
        assert len(server[0].requests) == 1


async def test_a_refusal_is_not_repeated(server: tuple[Server, str], client: HttpClient) -> None:
    with pytest.raises(EngineRefused):
        await client.control("POST", "/refuse", {}, deadline=5, repeatable=True)
    assert len(server[0].requests) == 1


async def test_a_request_to_a_closed_port_is_known_not_to_have_been_sent() -> None:
    for url, says in (
        ("http://127.0.0.1:1/x", "no server listens at http://127.0.0.1:1$"),
        ("https://255.255.255.255", "no connection to https://255.255.255.255: "),
    ):
        client = HttpClient("gone", url)
        with pytest.raises(EngineUnreachable, match=f"engine gone: {says}") as caught:
            await client.generate("/generate", {}, deadline=20)
        assert not caught.value.sent
        await client.close()


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("localhost:30000", "http://localhost:30000"),
        ("ftp://node:30000", "http://node:30000"),
        ("http:/127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://127.0.0.1:99999", "http://HOST:PORT"),
        ("http://127.0.0.1:port", "http://HOST:PORT"),
        ("", "http://HOST:PORT"),
    ],
)
def test_a_wrong_url_is_reported_with_the_right_form(url: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"'{url}' is not a server's URL; write {right}$"):
        HttpClient("mistyped", url)


async def test_a_host_that_is_not_known_is_no_fault_of_the_engine() -> None:
    client = HttpClient("lost", "http://no-such-host.invalid")
    with pytest.raises(LocalError, match="the host of http://no-such-host.invalid can't be resolved: "):
        await client.control("GET", "/health", deadline=20)
    await client.close()
    with pytest.raises(LocalError, match="its HTTP client is closed"):
        await client.generate("/generate", {}, deadline=5)


async def test_calls_behind_one_with_an_unknown_host_wait_no_longer_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.http.client.RESOLVE_PATIENCE", 1.0)
    client = HttpClient("lost", "http://no-such-host.invalid")
    first = asyncio.create_task(client.generate("/generate", {}, deadline=600))
    async with asyncio.timeout(60):
        while not client._line:
            await asyncio.sleep(0.01)
    begun = time.monotonic()
    calls = (client.generate("/generate", {}, deadline=600) for _ in range(300))
    answers = await asyncio.gather(first, *calls, return_exceptions=True)
    assert time.monotonic() - begun < 15  # one after the other would take 30
    assert {type(answer) for answer in answers} == {LocalError}
    await client.close()


async def test_requests_wait_for_a_connection_where_files_are_short(
    server: tuple[Server, str], client: HttpClient
) -> None:
    """Both ends are in this process, so each connection takes two files of the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 200, hard))
    try:
        answers = await asyncio.gather(*(client.generate("/echo", {"n": n}, deadline=60) for n in range(500)))
        assert await client.control("POST", "/echo", {}, deadline=5) == {}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [answer["n"] for answer in answers] == list(range(500))
    assert len(server[0].connections) < 200


async def test_events_come_one_by_one_and_a_broken_stream_is_an_error(client: HttpClient) -> None:
    assert [e async for e in client.events("/events", {}, deadline=5)] == [{"n": 1}, {"n": 2}]
    got = []
    with pytest.raises(EngineUnreachable, match="broke off"):
        async for event in client.events("/broken-events", {}, deadline=5):
            got.append(event)
    assert got == [{"n": 1}, {"n": 2}]


async def test_an_event_may_be_of_any_length(client: HttpClient) -> None:
    async with asyncio.timeout(30):
        lengths = [len(event["text"]) async for event in client.events("/long-events", {}, deadline=30)]
    assert tuple(lengths) == LENGTHS


async def test_a_close_that_was_cancelled_is_finished_by_the_next(server: tuple[Server, str]) -> None:
    """Otherwise a session is garbage with open connections, and aiohttp warns of it, which is an error here."""
    for wait in (0, 1, 2, 3):
        one = HttpClient("stub", server[1])
        await one.control("POST", "/echo", {}, deadline=5)
        await one.generate("/echo", {}, deadline=5)
        closing = asyncio.create_task(one.close())
        for _ in range(wait):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await one.close()
        del one, closing
        gc.collect()
