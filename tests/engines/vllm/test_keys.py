"""Which key each route needs, without a server, since the middleware is plain ASGI. `test_launch.py` has the real
server."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from millrace.extension.millrace_vllm_keys import Keys, answered_here

Ask = Callable[..., str]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Sends one request through the middleware. Returns `passed`, or how it was refused."""
    monkeypatch.setenv("MILLRACE_API_KEY", "data")
    monkeypatch.setenv("MILLRACE_ADMIN_API_KEY", "admin")
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        sent.append({"type": "passed"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a refused request is not read")

    keys = Keys(app)

    def one(method: str, path: str, *shown: str, kind: str = "http", **scope: Any) -> str:
        sent.clear()
        headers = [(b"authorization", header.encode("latin-1")) for header in shown]
        if method:
            scope["method"] = method
        asyncio.run(keys({"type": kind, "path": path, "headers": headers, **scope}, receive, send))
        return str(sent[0].get("status", sent[0]["type"]))

    return one


@pytest.mark.parametrize(
    ("method", "path", "without", "data", "admin"),
    [
        ("GET", "/health", "passed", "passed", "passed"),
        ("GET", "/metrics", "passed", "passed", "passed"),
        ("POST", "/health", "401", "401", "passed"),
        ("POST", "/inference/v1/generate", "401", "passed", "passed"),
        ("POST", "/v1/completions", "401", "passed", "passed"),
        ("GET", "/server_info", "401", "passed", "passed"),
        ("POST", "/pause", "401", "401", "passed"),
        ("POST", "/collective_rpc", "401", "401", "passed"),
        ("POST", "/v1/load_lora_adapter", "401", "401", "passed"),
        ("POST", "/inference/v1/generate/", "401", "401", "passed"),
        ("POST", "/inference/v1/abort_requests", "401", "401", "passed"),
        ("POST", "/a_route_of_the_future", "401", "401", "passed"),
        ("OPTIONS", "/pause", "401", "401", "passed"),
        ("DELETE", "/v1/completions", "401", "401", "passed"),
    ],
)
def test_each_route_needs_its_key(ask: Ask, method: str, path: str, without: str, data: str, admin: str) -> None:
    assert ask(method, path) == without
    assert ask(method, path, "Bearer data") == data
    assert ask(method, path, "bearer admin") == admin
    for wrong in ("Bearer", "Bearer ", "Basic admin", "Bearer admin ", "Bearer adm\xedn", "admin"):
        assert ask(method, path, wrong) == without
    # Servers may differ in which of two headers they read.
    assert ask(method, path, "Bearer admin", "Bearer admin") == without


def test_a_websocket_needs_a_key_too(ask: Ask) -> None:
    assert ask("", "/v1/realtime", kind="websocket") == "websocket.close"
    assert ask("", "/v1/realtime", "Bearer data", kind="websocket") == "passed"
    assert ask("", "", kind="lifespan") == "passed"


def test_behind_a_prefix_the_routes_are_the_same(ask: Ask) -> None:
    assert ask("POST", "/llm/v1/completions", "Bearer data", root_path="/llm") == "passed"
    assert ask("POST", "/llm/pause", "Bearer data", root_path="/llm") == "401"


@pytest.mark.parametrize("name", ["MILLRACE_API_KEY", "MILLRACE_ADMIN_API_KEY"])
def test_a_server_without_keys_does_not_start(ask: Ask, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(ValueError, match="must not be empty"):
        Keys(lambda *_: asyncio.sleep(0))
    monkeypatch.delenv(name)
    with pytest.raises(KeyError, match=name):
        Keys(lambda *_: asyncio.sleep(0))


class Engine:
    """Stands for vLLM's engine client, as far as a pause uses it. Records the calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.renderer = self.engine_core = self
        self._error = error

    async def clear_mm_cache_async(self) -> None:
        self.calls.append(("clear",))

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        if self._error is not None:
            raise self._error
        self.calls.append((mode, clear_cache))


@pytest.mark.parametrize(
    ("query", "calls"),
    [
        (b"mode=abort&at_once=true", [("clear",), ("abort", True)]),
        (b"mode=keep&clear_cache=false&at_once=true", [("keep", False)]),
        (b"mode=abort", []),
        (b"at_once=true", [("clear",)]),  # without a mode, vLLM's own route answers
        (b"", []),
    ],
)
def test_a_pause_at_once_is_answered_here(ask: Ask, query: bytes, calls: list[tuple[Any, ...]]) -> None:
    engine = Engine()
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    answer = ask("POST", "/pause", "Bearer admin", query_string=query, app=app)
    assert engine.calls == calls
    assert answer == ("200" if ("abort", True) in calls or ("keep", False) in calls else "passed")
    assert ask("POST", "/pause", "Bearer data", query_string=query, app=app) == "401"
    assert engine.calls == calls


def test_vllm_answers_a_pause_that_fails_here(ask: Ask) -> None:
    failing = SimpleNamespace(state=SimpleNamespace(engine_client=Engine(RuntimeError("the engine is dead"))))
    for app in (failing, SimpleNamespace(state=SimpleNamespace())):
        assert ask("POST", "/pause", "Bearer admin", query_string=b"mode=abort&at_once=true", app=app) == "passed"


class Cores:
    """Stands for vLLM's client of two engine cores, as far as a call of every rank uses it. Records the calls."""

    core_engines = (b"zero", b"one")

    def __init__(self, *answers: Any) -> None:
        self._answers = dict(zip(self.core_engines, answers, strict=True))
        self.calls: list[tuple[Any, ...]] = []

    async def _call_utility_async(self, *call: Any, engine: bytes) -> Any:
        if isinstance(answer := self._answers[engine], Exception):
            raise answer
        await asyncio.sleep(0)
        self.calls.append((engine, *call))
        return answer


def called(client: Any, body: bytes, query: bytes = b"every_rank=true") -> tuple[int, Any] | None:
    """Returns the status and the body of the answer to a call of every rank. None if vLLM must answer."""
    sent: list[Any] = []
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(engine_core=client)))
    parts = [{"type": "http.request", "body": body[:5], "more_body": True}, {"type": "http.request", "body": body[5:]}]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "app": app, "query_string": query}
    if not asyncio.run(answered_here("/collective_rpc", scope, receive, send)):
        assert len(parts) == 2, "vLLM would miss the body"
        return None
    return sent[0]["status"], json.loads(sent[1]["body"])


CALL = b'{"method": "millrace_state", "args": ["a", "b"]}'


def test_a_call_has_the_answers_of_every_rank() -> None:
    client = Cores([{"rank": 0}, {"rank": 1}], [{"rank": 2}, {"rank": 3}])
    assert called(client, CALL) == (200, {"results": [{"rank": 0}, {"rank": 1}, {"rank": 2}, {"rank": 3}]})
    sent: tuple[object, ...] = ("collective_rpc", "millrace_state", None, ("a", "b"), {})
    assert client.calls == [(b"zero", *sent), (b"one", *sent)]


def test_a_rank_that_raises_is_named_when_all_have_answered() -> None:
    client = Cores(RuntimeError("out of memory"), [{}])
    assert called(client, CALL) == (500, {"error": "data-parallel rank 0: out of memory"})
    assert len(client.calls) == 1


@pytest.mark.parametrize("body", [b"not JSON", b"[1, 2]", b"{}", b'{"method": "a", "args": 3}', b"null"])
def test_a_call_of_every_rank_in_another_form_is_refused(body: bytes) -> None:
    client = Cores([], [])
    answer = called(client, body)
    assert answer is not None
    assert answer[0] == 400
    assert not client.calls


def test_vllm_answers_other_calls() -> None:
    client = Cores([], [])
    assert called(client, CALL, query=b"") is None
    assert called(SimpleNamespace(), CALL) is None  # a client of one core
    client.core_engines = (b"zero",)  # type: ignore[assignment]
    assert called(client, CALL) is None
    assert not client.calls
