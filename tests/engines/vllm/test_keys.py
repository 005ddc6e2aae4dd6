"""Which key each route needs, without a server, since the middleware is plain ASGI. `test_launch.py` has the real
server."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from millrace.extension.millrace_vllm_keys import Keys

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
