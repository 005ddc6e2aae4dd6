"""Clients that agents are written with, each in a process of its own before the gateway: `make test-sdks`."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from millrace import open_fleet
from millrace.gateway import load_format, serve_gateway
from millrace.gateway.control import sample_view
from millrace.gateway.gateway import Gateway, OpenEpisode
from tests.gateway.formats import format_of
from tests.gateway.qwen import call, results, said_in, turn
from tests.gateway.scripted import Script, ScriptedFleet
from tests.gateway.trained import assert_trained_once

PYTHON = Path(os.environ.get("SDKS_PYTHON", ".venv-sdks/bin/python"))  # as `make test-sdks` sets it
ROOT = Path(__file__).parents[2]
CLIENTS = {
    "openai": ("chat", "responses"),
    "anthropic": ("messages",),
    "openai_agents": ("chat", "responses"),
    "pydantic_ai": ("chat", "responses", "messages"),
    "langgraph": ("chat", "responses", "messages"),
    "litellm": ("chat", "messages"),
    "smolagents": ("chat",),
}
PACKAGES = {"openai_agents": "agents", "langgraph": "langchain_openai"}  # what a client needs, if it has another name
ANSWER = "It is sunny, and it is noon."


def script(prompt: str) -> str:
    """Calls a tool, then the other one, and answers."""
    match results(said_in(prompt)):
        case 0:
            return turn("Let me look.", call("weather", city="Zürich"))
        case 1:
            return turn("", call("clock", zone="CET"))
    return turn(ANSWER)


def branching(prompt: str) -> str:
    """The same for smolagents, which takes answers of tools as the user's, and an answer as a call."""
    asked = [one.text for one in said_in(prompt) if one.role == "user" and one.text.startswith("Observation")]
    calls = [call("weather", city="Zürich"), call("clock", zone="CET"), call("final_answer", answer=ANSWER)]
    written = calls[len(asked)]
    return written.removeprefix("<tool_call>") if prompt.endswith("<tool_call>") else written


async def run(client: str, jobs: Sequence[tuple[OpenEpisode, str, str]]) -> list[Any]:
    """Runs a client on episodes, each with a protocol and what to do, and returns what came of each."""
    arguments = json.dumps([[opened.base_url, opened.api_key, *job] for opened, *job in jobs])
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, "-m", f"tests.gateway.sdks.{client}_sdk", arguments),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return list(json.loads(output.splitlines()[-1]))


@pytest.fixture
def client(request: pytest.FixtureRequest) -> str:
    """The name of a client that is installed."""
    name = str(request.param)
    package = PACKAGES.get(name, name)
    if not any(PYTHON.parents[1].glob(f"lib/python*/site-packages/{package}")):
        pytest.skip(f"{package} is not installed: make test-sdks")
    return name


@asynccontextmanager
async def scripted(written: Script) -> AsyncIterator[tuple[Gateway, ScriptedFleet]]:
    turns = format_of("qwen3")
    fleet = ScriptedFleet(turns.chat.tokenizer, turns.stop_token_ids[0], written)
    async with serve_gateway(fleet, turns, key="key") as gateway:  # type: ignore[arg-type]
        yield gateway, fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """A gateway before the embedded engine."""
    folder = tmp_path_factory.mktemp("fleet")
    async with (
        open_fleet({"kind": "embedded"}, tiny_model, log_dir=folder) as fleet,
        serve_gateway(fleet, load_format(tiny_model), key="key") as gateway,
    ):
        yield gateway


@pytest.mark.parametrize("client", [name for name in CLIENTS if name != "smolagents"], indirect=True)
async def test_a_tool_loop_is_one_sample(client: str) -> None:
    async with scripted(script) as (gateway, fleet):
        jobs = [(gateway.open_episode(), *job) for job in product(CLIENTS[client], ("whole", "streamed"))]
        assert await run(client, jobs) == [ANSWER] * len(jobs)
    samples = []
    for opened, *_ in jobs:
        [sample] = map(sample_view, opened.samples())
        samples.append(sample)
        assert sample["nodes"] == (0, 1, 2)
        text = fleet.tokenizer.decode(sample["token_ids"])
        assert "It is sunny in Zürich." in text
        assert "It is noon, CET." in text
        assert set(opened.episode.counts) == {"requests"}, opened.episode.counts
    assert_trained_once(samples, [(one.request.input_ids, one.output_ids) for one in fleet.asked])


@pytest.mark.parametrize("client", ["smolagents"], indirect=True)
async def test_smolagents_branches_at_each_turn(client: str) -> None:
    """It replays its calls as text, so that each request begins a conversation."""
    async with scripted(branching) as (gateway, fleet):
        jobs = [(gateway.open_episode(), "chat", mode) for mode in ("whole", "streamed")]
        assert await run(client, jobs) == [ANSWER] * 2
    views = [list(map(sample_view, opened.samples())) for opened, *_ in jobs]
    assert_trained_once(chain(*views), [(one.request.input_ids, one.output_ids) for one in fleet.asked])
    for samples, (opened, *_) in zip(views, jobs, strict=True):
        assert [sample["nodes"] for sample in samples] == [(0,), (1,), (2,)]
        assert [sample["reasons"] for sample in samples] == [{}, {"1": "history_edited"}, {"2": "history_edited"}]
        assert opened.episode.counts["malformed"] == 0


@pytest.mark.parametrize("client", CLIENTS, indirect=True)
@pytest.mark.asyncio(loop_scope="module")
async def test_clients_get_the_token_counts_of_a_real_engine(client: str, real: Gateway) -> None:
    protocols = ["chat"] if client == "openai_agents" else CLIENTS[client]  # its other one takes no answer that was cut
    jobs = [(real.open_episode(), protocol, "once") for protocol in protocols]
    counts = await run(client, jobs)
    for (opened, protocol, _), (prompt, output) in zip(jobs, counts, strict=True):
        [node] = opened.episode.tree.nodes
        assert (prompt, output) == (len(node.context_ids), len(node.output_ids)), protocol
        assert 0 < output <= 8
        assert opened.samples()[0].episode.loss_mask.sum() == output
