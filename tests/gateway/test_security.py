"""Agents are not trusted: no request reads another episode, and no key is shown."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from millrace.gateway import server
from tests.gateway.wire import KEY, QUESTION, Served, served, until

pytestmark = pytest.mark.asyncio
ASKED = {"messages": [QUESTION]}


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Served]:
    async with served() as site:
        site.engine.let_go()
        yield site


async def raw(site: Served, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Sends these lines as they are, and returns status and rest of what comes back until the gateway closes."""
    async with site.wire() as wire:
        wire.writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        await wire.writer.drain()
        answer = await asyncio.wait_for(wire.reader.read(), 30)
    return int(answer.split()[1]), answer


def asking(site: Served, path: str, *headers: str) -> tuple[list[str], bytes]:
    body = json.dumps(ASKED).encode()
    head = [f"POST {path} HTTP/1.1", "Host: a", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return head, body


async def test_the_secret_in_the_path_decides_and_not_the_header(site: Served) -> None:
    other = site.gateway.open_episode()
    status, _ = await site.ask(ASKED, {"Authorization": f"Bearer {other.api_key}", "x-api-key": other.api_key})
    assert status == 200
    assert (len(site.opened.samples()), len(other.samples())) == (1, 0)


async def test_two_keys_in_one_request_are_refused(site: Served) -> None:
    """Proxies differ in which of two headers they read."""
    other = site.gateway.open_episode()
    for headers in [
        (f"Authorization: Bearer {site.opened.api_key}", f"Authorization: Bearer {other.api_key}"),
        (f"Authorization: Bearer {site.opened.api_key}", f"x-api-key: {other.api_key}"),
        (f"x-api-key: {site.opened.api_key}", f"x-api-key: {other.api_key}"),
    ]:
        head, body = asking(site, "/v1/chat/completions", *headers)
        status, answer = await raw(site, *head, body=body)
        assert status == 401
        assert b"different keys" in answer
    head, body = asking(site, "/v1/chat/completions", *[f"x-api-key: {other.api_key}"] * 2)
    assert (await raw(site, *head, body=body))[0] == 200
    assert (len(site.opened.samples()), len(other.samples())) == (0, 1)


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Content-Length: 50"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity", "Content-Length: 3"],
        ["Content-Length: +5"],
        ["Content-Length : 5"],
        [" folded: 1"],
        ["x-bad\x00name: 1"],
        ["X-Long: " + "a" * 20_000],
    ],
)
async def test_requests_that_two_parsers_read_in_two_ways_are_refused(site: Served, lines: list[str]) -> None:
    head = [f"POST {site.path} HTTP/1.1", "Host: a", "Connection: close", *lines]
    smuggled = f"0\r\n\r\nPOST {site.path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    status, answer = await raw(site, *head, body=smuggled.encode())
    assert status == 400
    assert answer.count(b"HTTP/1.") == 1
    assert site.engine.asked == []


async def test_a_key_can_not_bring_headers_along(site: Served) -> None:
    head, body = asking(site, "/e/x%0d%0aSet-Cookie:%20a=1/v1/chat/completions")
    status, answer = await raw(site, *head, body=body)
    assert status == 401
    assert b"Set-Cookie" not in answer


async def test_bodies_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGEST_BODY", 1000)
    async with served() as small:
        long = {"messages": [{"role": "user", "content": "x" * 1000}]}
        for path in (small.path, "/episodes"):
            status, error = await small.ask(long, small.control(), path)
            assert status == 413
            assert error["error"]["code"] in ("too_large", 413)
        assert (await small.ask(b"", small.control(), "/episodes"))[0] == 200


DEEP = json.loads('{"a":' * 300 + "1" + "}" * 300)


def image(url: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"\xff", b"null", b'"text"', b"[" * 5000, b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        {"messages": []}, {"messages": "text"}, {"messages": [1]}, {"messages": [{}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": {"type": "text"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "root", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"id": "a"}]}, QUESTION]},
        {**ASKED, "tools": 5}, {**ASKED, "tools": [1]}, {**ASKED, "tools": [{"type": "function"}]},
        {**ASKED, "n": 0}, {**ASKED, "n": "many"}, {**ASKED, "n": 10**6},
        {**ASKED, "max_tokens": "x"}, {**ASKED, "max_tokens": -1},
        {**ASKED, "temperature": "hot"},
        {**ASKED, "stop": 5}, {**ASKED, "stop": [1, None]},
        {**ASKED, "logit_bias": [1]}, {**ASKED, "logit_bias": {"a": 1}},
        {**ASKED, "tool_choice": "never"}, {**ASKED, "tool_choice": "required"},
        {**ASKED, "response_format": {"type": "xml"}}, {**ASKED, "seed": "x"},
        {**ASKED, "tools": [{"type": "function", "function": {"name": "a", "parameters": DEEP}}]},
        image("file:///etc/passwd"),
        image("http://127.0.0.1/a"),
        image("/etc/passwd"),
        image("data:image/png;base64,!!"),
        image("data:image/png;base64," + base64.b64encode(b"no image").decode()),
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "/etc/passwd"}}]}]},
    ],
)  # fmt: skip
async def test_bad_bodies_are_refused_in_the_protocols_form(
    site: Served, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    status, answer = await site.ask(body)
    assert status == 400, answer
    assert answer["error"]["message"]
    assert "root:" not in str(answer)
    assert site.engine.asked == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert (await site.ask(ASKED))[0] == 200


@pytest.mark.parametrize("model", ["/etc/passwd", "../../secret", "file:///etc/passwd", "x" * 5000, ""])
async def test_names_of_models_open_nothing(site: Served, model: str) -> None:
    status, answer = await site.ask({**ASKED, "model": model})
    assert (status, answer["model"]) == (200, model or "policy")


async def test_the_control_routes_need_the_gateways_key(site: Served) -> None:
    secret = site.opened.api_key
    routes = [("POST", "/episodes"), ("GET", "/episodes"), ("DELETE", f"/episodes/{site.opened.id}")]
    routes += [("GET", f"/episodes/{site.opened.id}{end}") for end in ("", "/samples")]
    routes += [("POST", f"/episodes/{site.opened.id}/finish")]
    for method, path in routes:
        for headers in (
            {},
            {"Authorization": f"Bearer {secret}"},
            {"x-api-key": KEY},
            {"Authorization": "Bearer \udcff"},
        ):
            async with site.wire() as wire:
                await wire.send(path, b"", headers, method)
                assert (await wire.response())[0] == 401
    assert not site.opened.episode.closed
    async with site.wire() as wire:
        await wire.send("/episodes/none", b"", site.control(), "GET")
        assert (await wire.response())[0] == 404


async def test_what_the_control_routes_show_has_no_key(site: Served) -> None:
    await site.ask(ASKED)
    secret = site.opened.api_key
    for path in ("/episodes", f"/episodes/{site.opened.id}", f"/episodes/{site.opened.id}/samples"):
        async with site.wire() as wire:
            await wire.send(path, b"", site.control(), "GET")
            status, answer = await wire.response()
        assert status == 200
        assert secret not in str(answer)
        assert KEY not in str(answer)


async def test_keys_stand_in_no_log_repr_or_error(site: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = site.opened.api_key
    answers = [
        await site.ask(ASKED),
        await site.ask({"messages": []}),
        await site.ask(ASKED, path=f"/e/{secret}x/v1/chat/completions"),
    ]
    head, body = asking(site, "/v1/nothing", f"x-api-key: {secret}")
    answers.append(await raw(site, *head, body=body))
    head, body = asking(site, "/v1/chat/completions", f"x-api-key\0: {secret}")
    assert (await raw(site, *head, body=body))[0] == 400
    site.engine.steps = asyncio.Semaphore(0)
    async with site.wire() as wire:
        await wire.send(site.path, {**ASKED, "stream": True})
        await until(lambda: site.engine.waiting == 1)
        wire.cut()
        await until(lambda: site.opened.episode.counts["interrupted"] == 1)
    shown = [
        caplog.text,
        str(answers),
        repr(site.opened),
        repr(site.gateway),
        repr(site.opened.episode),
        str(site.gateway.__dict__),
    ]
    assert [text for text in shown if secret in text or KEY in text] == []


async def test_an_error_within_the_gateway_is_told_without_its_inside(
    site: Served, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str) -> str:
        raise RuntimeError(f"the inside {KEY}")

    site.engine.script = broken
    status, answer = await site.ask(ASKED)
    assert status == 500
    assert "inside" not in str(answer)
    assert (answer["error"]["type"], site.opened.episode.turns) == ("server_error", [])
    status, _ = await site.ask({**ASKED, "stream": True})
    assert status == 500
    assert "the inside" in caplog.text  # for the one who runs the gateway


@pytest.mark.parametrize(
    "path", ["/e", "/e/", "/e/x/../../episodes", "//episodes", "/episodes/", "/v1/../episodes", "/static/a"]
)
async def test_paths_that_are_none(site: Served, path: str) -> None:
    async with site.wire() as wire:
        await wire.send(path, b"", {}, "GET")
        status, headers = await wire.head()
    assert status in (401, 404)
    assert "location" not in headers


async def test_an_agent_reads_no_other_episode(site: Served) -> None:
    other = site.gateway.open_episode()
    await site.ask(ASKED)
    _, answer = await site.ask(
        {"messages": [QUESTION, {"role": "assistant", "content": "Answer 1"}, QUESTION]},
        path=f"/e/{other.api_key}/chat/completions",
    )
    assert answer["choices"]
    [sample] = other.samples()
    assert sample.nodes == (0,)
    ids = {one.request.request_id.partition("-")[0] for one in site.engine.asked}
    assert ids == {site.opened.id, other.id}  # sessions of engines are apart too


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", "/v1/chat", {}, 404, "there is no route /v1/chat; docs/gateway.md lists the routes"),
        ("POST", "/episodes/none/finish", {}, 404, "there is no such episode"),
        ("PUT", "/episodes", {}, 405, "/episodes takes GET, HEAD, POST, not PUT"),
        ("POST", "/episodes", {"metdata": {}}, 400, "unknown field metdata; did you mean 'metadata'?"),
        ("POST", "/episodes", {"x": 1}, 400, "unknown field x; valid: metadata"),
        ("POST", "/update_weights", {}, 400, "weight_dir: Field required"),
    ],
)  # fmt: skip
async def test_a_mistaken_request_is_told_what_is_wrong(
    site: Served, method: str, path: str, body: dict[str, object], status: int, told: str
) -> None:
    async with site.wire() as wire:
        await wire.send(path, json.dumps(body).encode(), site.control(), method)
        found, answer = await wire.response()
    assert (found, answer["error"]) == (status, {"message": told, "code": status})
