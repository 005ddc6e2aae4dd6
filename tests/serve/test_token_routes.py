"""A fleet behind the routes of a vLLM server, asked over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from millrace.errors import ArgumentError, ConfigError
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.serve.token_routes import serve_tokens
from millrace.types import GenerateRequest, SamplingParams
from tests.fleet.test_fleet import CONFIG, PROMPT, embedded

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = "the server's key"
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
END = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


class Client:
    """A client of the server, which sends its key."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(path) as response:
            return response.status, json.loads(await response.read() or b"null")

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        async with self.http.post(path, json=body) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: object) -> list[Any]:
        async with self.http.post(path, json=body) as response:
            lines = [line async for line in response.content if line.strip()]
        assert lines.pop() == b"data: [DONE]\n"
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(fleet: Fleet) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        serve_tokens(fleet, key=KEY, model="policy") as url,
        aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(END)) as http,
    ):
        yield Client(http)


async def test_tokens_and_logprobs_are_the_fleets(fleet: Fleet, client: Client) -> None:
    request = GenerateRequest(PROMPT, SamplingParams(8, temperature=0.0, ignore_eos=True), prompt_logprobs=True)
    made = await fleet.generate(request, deadline=END)
    body = {
        "model": "policy",
        "token_ids": PROMPT,
        "sampling_params": {**GREEDY, "prompt_logprobs": 1, "routed_experts_prompt_start": 3},
    }
    status, answer = await client.post("/inference/v1/generate", {**body, "request_id": "mine", "cache_salt": "v1"})
    assert (status, answer["request_id"]) == (200, "mine")
    [choice] = answer["choices"]
    assert (tuple(choice["token_ids"]), choice["finish_reason"]) == (made.output_ids, "length")
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in made.output_ids]
    assert [entry["token_id"] for entry in content] == list(made.output_ids)
    np.testing.assert_allclose([entry["logprob"] for entry in content], made.logprobs, atol=1e-5)
    assert choice["weight_versions"] == [{"version": str(fleet.version), "start": 0, "end": 8}]
    assert made.prompt_logprobs is not None
    assert answer["prompt_logprobs"][0] is None
    scored = [next(iter(entry.values()))["logprob"] for entry in answer["prompt_logprobs"][1:]]
    np.testing.assert_allclose(scored, made.prompt_logprobs[1:], atol=1e-5)
    assert answer["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 8, "total_tokens": len(PROMPT) + 8}


async def test_completions_take_several_prompts_and_samples(client: Client) -> None:
    prompts = [list(PROMPT), [3, 4]]
    body = {"model": "policy", "prompt": prompts, "n": 2, "return_token_ids": True, **GREEDY}
    status, answer = await client.post("/v1/completions", body)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [prompts[0], prompts[0], *[prompts[1]] * 2]
    tokens = [choice["token_ids"] for choice in answer["choices"]]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    assert all(len(choice["logprobs"]["token_logprobs"]) == 8 for choice in answer["choices"])
    status, answer = await client.post("/v1/completions", {"prompt": [3, 4], "ignore_eos": True})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 16)  # OpenAI's default


async def test_a_stream_brings_the_same_tokens_in_parts(fleet: Fleet, client: Client) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.02)
    whole = {"token_ids": PROMPT, "sampling_params": GREEDY}
    _, answer = await client.post("/inference/v1/generate", whole)
    events = await client.events(
        "/inference/v1/generate", {**whole, "stream": True, "stream_options": {"include_usage": True}}
    )
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.0)
    parts = [event["choices"][0] for event in events]
    assert len(parts) > 2
    assert [token for part in parts for token in part["token_ids"]] == answer["choices"][0]["token_ids"]
    assert [entry for part in parts for entry in part["logprobs"]["content"]] != []
    assert [part["finish_reason"] for part in parts[-2:]] == [None, "length"]
    assert events[-1]["usage"]["completion_tokens"] == 8


async def test_the_model_and_its_context_are_listed(fleet: Fleet, client: Client) -> None:
    status, answer = await client.get("/v1/models")
    [card] = answer["data"]
    assert (status, card["id"], card["max_model_len"]) == (200, "policy", fleet.context_length)
    assert await client.get("/health") == (200, None)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/inference/v1/generate", {"token_ids": [1], "model": "other"}, 404, "the model 'other' is not served here"),
        ("/inference/v1/generate", {"token_ids": []}, 400, "token_ids: List should have at least 1 item"),
        ("/inference/v1/generate", {"token_ids": [1], "features": {}}, 400, "features: Extra inputs are not permitted"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"logprobs": 5}}, 400, "logprobs"),
        ("/inference/v1/generate", {"token_ids": [10**6]}, 400, "vocabulary"),
        ("/inference/v1/generate", {"token_ids": [1] * 300}, 400, "the prompt has 300 tokens"),
        ("/inference/v1/generate", {"token_ids": [1], "stream": True, "sampling_params": {"n": 2}}, 400, "n=1"),
        ("/v1/completions", {"prompt": "text"}, 400, "prompt is text; this server takes prompts as token ids"),
        ("/v1/completions", {"prompt": [1], "echo": True}, 400, "echo"),
        ("/update_weights", {"weight_dir": None}, 400, "weight_dir is null"),
        ("/update_weights", {"weight_dir": "/no/such/folder"}, 400, "/no/such/folder"),
        ("/pause?mode=abort", None, 400, "mode 'abort' is not supported"),
        ("/v1/embeddings", {}, 404, "Not Found"),
    ],
)
async def test_what_can_not_be_served_is_refused_in_one_line(
    client: Client, path: str, body: object, status: int, says: str
) -> None:
    got, answer = await client.post(path, body)
    assert got == status, answer
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


async def test_only_clients_with_the_key_are_served(client: Client) -> None:
    url = client.http._base_url
    async with aiohttp.ClientSession(url, headers={"Authorization": "Bearer wrong"}) as stranger:
        for method, path in (("GET", "/v1/models"), ("POST", "/pause"), ("POST", "/inference/v1/generate")):
            async with stranger.request(method, path) as response:
                assert response.status == 401
        async with stranger.get("/health") as response:
            assert response.status == 200


async def test_a_paused_server_holds_new_requests_until_it_is_resumed(fleet: Fleet, client: Client) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.05)
    long = {"token_ids": PROMPT, "sampling_params": {**GREEDY, "max_tokens": 40}}
    running = asyncio.create_task(client.post("/inference/v1/generate", long))
    async with asyncio.timeout(END):
        while not any(fleet.outstanding.values()):
            await asyncio.sleep(0.01)
    assert await client.post("/pause?mode=keep") == (200, {"status": "paused"})
    assert not running.done()
    assert await client.post("/pause?mode=wait") == (200, {"status": "paused"})
    [choice] = (await running)[1]["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 40)
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.0)
    held = asyncio.create_task(client.post("/inference/v1/generate", {**long, "sampling_params": GREEDY}))
    assert await client.get("/health") == (200, None)
    assert not held.done()
    assert not any(fleet.outstanding.values())
    assert await client.post("/resume") == (200, {"status": "resumed"})
    assert (await held)[0] == 200


async def test_prime_rls_weight_update(fleet: Fleet, client: Client, tiny_model: Path, tmp_path: Path) -> None:
    body = {"token_ids": PROMPT, "sampling_params": GREEDY}
    before = (await client.post("/inference/v1/generate", body))[1]["choices"][0]
    weights = load_file(tiny_model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert await client.post("/pause?mode=keep&clear_cache=false") == (200, {"status": "paused"})
    status, report = await client.post("/update_weights", {"weight_dir": str(tmp_path)})
    assert (status, report) == (200, {"version": fleet.version, "failed": {}})
    assert await client.post("/resume") == (200, {"status": "resumed"})
    after = (await client.post("/inference/v1/generate", body))[1]["choices"][0]
    assert after["token_ids"] != before["token_ids"]
    assert [span["version"] for span in after["weight_versions"]] == [str(fleet.version)]
    assert fleet.labels[report["version"]] == tmp_path.name


async def test_a_follower_serves_requests_and_no_update(fleet: Fleet, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        fleet.share() as shared,
        follow_fleet(shared.url, shared.key) as follower,
        serve_tokens(follower, key=KEY, model="policy") as url,
        aiohttp.ClientSession(url, headers=headers) as http,
    ):
        client = Client(http)
        status, _ = await client.post("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": GREEDY})
        assert status == 200
        status, answer = await client.post("/update_weights", {"weight_dir": str(tmp_path)})
        assert (status, "only its owner can update weights" in answer["error"]["message"]) == (400, True)


async def test_what_takes_too_long_is_one_line(fleet: Fleet) -> None:
    async with (
        serve_tokens(fleet, key=KEY, model="policy", timeout=0.5) as url,
        aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {KEY}"}) as http,
    ):
        client = Client(http)
        body = {"token_ids": PROMPT, "sampling_params": {**GREEDY, "max_tokens": 200}, "stream": True}
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.05)
        async with http.post("/inference/v1/generate", json=body) as response:
            lines = [line async for line in response.content if line.strip()]
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.0)
        assert "choices" in json.loads(lines[0].removeprefix(b"data: "))
        assert "error" in json.loads(lines[-1].removeprefix(b"data: "))
        assert await client.post("/pause?mode=keep") == (200, {"status": "paused"})
        status, answer = await client.post("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": GREEDY})
        assert (status, answer["error"]["message"]) == (503, "not done within 0.5 s")


async def test_an_empty_key_opens_nothing(fleet: Fleet) -> None:
    with pytest.raises(ArgumentError, match="key must be ASCII text"):
        async with serve_tokens(fleet, key="", model="policy"):
            pass


async def test_a_port_in_use_is_named(fleet: Fleet, client: Client) -> None:
    port = client.http._base_url.port  # type: ignore[union-attr]
    assert port is not None
    with pytest.raises(ConfigError, match=f"requests can't be served at 127.0.0.1:{port} .*set another port"):
        async with serve_tokens(fleet, key=KEY, model="policy", port=port):
            pass
