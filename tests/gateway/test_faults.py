"""Real engines that are killed, and weights that are published, in the middle of a turn: the agent sees a pause."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import EngineError, EngineUnreachable
from millrace.fleet.client import FleetClient
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.gateway import GatewaySample, OpenEpisode, load_format, serve_gateway
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams
from tests.fleet.test_fleet import PROMPT, embedded, tensors, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)
TOKENS = 60
REQUEST = GenerateRequest(PROMPT, SamplingParams(TOKENS, temperature=0.0, ignore_eos=True))
END = 60.0
QUESTION = {"role": "user", "content": "1 + 1?"}
KINDS = pytest.mark.parametrize("stream", [False, True])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = CONFIG.model_copy(update={"replicas": 1})
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def doomed_fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        yield fleet


async def slow(fleet: Fleet, seconds: float) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=seconds)


async def kill_the_busy_one(fleet: Fleet, tokens: int = 8) -> None:
    """Kills the engine that runs a request, once it has made that many tokens more."""
    async with asyncio.timeout(END):
        while True:
            for engine in embedded(fleet):
                if (await engine.loads()).running_requests:
                    with suppress(EngineError):
                        await engine.inject_fault("crash", after_tokens=tokens)
                    return


async def streamed(fleet: FleetClient, retries: int) -> list[Generation]:
    return [part async for part in fleet.stream(REQUEST, deadline=END, retries=retries)]


@pytest.mark.parametrize("by_follower", [False, True])
async def test_a_stream_goes_on_with_another_engine(doomed_fleet: Fleet, by_follower: bool) -> None:
    whole = (await doomed_fleet.generate(REQUEST, deadline=END)).output_ids
    await slow(doomed_fleet, 0.02)
    async with doomed_fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:
        running = asyncio.create_task(streamed(follower if by_follower else doomed_fleet, retries=1))
        await kill_the_busy_one(doomed_fleet)
        parts = await running
    assert parts[-1].output_ids == whole
    assert [part.finish_reason for part in parts[-2:]] == [FinishReason.ABORT, FinishReason.LENGTH]
    assert {part.request_id for part in parts} == {REQUEST.request_id}
    for before, after in itertools.pairwise(parts):
        assert after.output_ids[: len(before.output_ids)] == before.output_ids
        assert len(after.logprobs) == len(after.output_ids)
    [span] = parts[-1].version_spans
    assert (span.start, span.end) == (0, TOKENS)
    assert sum(1 for state in doomed_fleet.snapshot.replicas if state.routable) == 1


async def test_a_stream_without_retries_fails_with_its_engine(doomed_fleet: Fleet) -> None:
    await slow(doomed_fleet, 0.02)
    running = asyncio.create_task(streamed(doomed_fleet, retries=0))
    await kill_the_busy_one(doomed_fleet)
    with pytest.raises(EngineUnreachable):
        await running


async def test_a_stream_is_asked_for_with_retries_that_it_does_not_need(fleet: Fleet) -> None:
    parts = await streamed(fleet, retries=3)
    assert len(parts) > 2
    assert parts[-1].output_ids == (await fleet.generate(REQUEST, deadline=END)).output_ids


@asynccontextmanager
async def agent(fleet: Fleet, folder: Path) -> AsyncIterator[tuple[OpenEpisode, Any]]:
    """An episode, and a function that asks for a turn of TOKENS tokens."""
    turns = load_format(folder)
    never = dict.fromkeys(map(str, turns.stop_token_ids), -100.0)
    async with serve_gateway(fleet, turns, key="key") as gateway, gateway.episode() as episode:

        async def ask(stream: bool, **more: object) -> tuple[int, str]:
            body = {"messages": [QUESTION], "max_tokens": TOKENS, "temperature": 0.0, "logit_bias": never}
            async with (
                aiohttp.ClientSession() as http,
                http.post(
                    f"{episode.base_url}/v1/chat/completions", json={**body, "stream": stream, **more}
                ) as response,
            ):
                return response.status, content(await response.text())

        yield episode, ask


def content(text: str) -> str:
    if text.startswith("{"):
        made = json.loads(text)
        return str(made["error"]["message"] if "error" in made else made["choices"][0]["message"]["content"])
    lines = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    return "".join(line["choices"][0]["delta"].get("content", "") for line in lines)


def only(episode: OpenEpisode) -> tuple[GatewaySample, tuple[int, ...]]:
    """The one sample of an episode, and its sampled tokens."""
    [sample] = episode.samples()
    mask = sample.episode.loss_mask
    return sample, tuple(token for token, on in zip(sample.episode.token_ids, mask, strict=True) if on)


@KINDS
async def test_an_engine_that_is_killed_is_a_pause(doomed_fleet: Fleet, tiny_model: Path, stream: bool) -> None:
    async with agent(doomed_fleet, tiny_model) as (calm, ask):
        before = await ask(stream)
        _, whole = only(calm)
    await slow(doomed_fleet, 0.02)
    async with agent(doomed_fleet, tiny_model) as (episode, ask):
        running = asyncio.create_task(ask(stream))
        await kill_the_busy_one(doomed_fleet)
        assert await running == before == (200, before[1])
    sample, tokens = only(episode)
    assert tokens == whole
    [span] = sample.episode.version_spans
    assert (span.version, span.end - span.start) == (doomed_fleet.version, TOKENS)
    assert (sample.reasons, episode.episode.counts["requests"]) == ({}, 1)


@KINDS
async def test_the_last_engine_that_is_killed_is_an_error_of_the_protocol(
    doomed_fleet: Fleet, tiny_model: Path, stream: bool
) -> None:
    await slow(doomed_fleet, 0.02)
    async with agent(doomed_fleet, tiny_model) as (episode, ask):
        for engine in embedded(doomed_fleet):
            with suppress(EngineError):
                await engine.inject_fault("crash")
        await until(lambda: not doomed_fleet.snapshot.usable)
        status, message = await ask(stream)
        assert status == 503
        assert "dead" in message
    assert episode.samples() == []


@KINDS
async def test_weights_that_are_published_within_a_turn_have_their_own_span(
    fleet: Fleet, tiny_model: Path, stream: bool
) -> None:
    """The embedded engine loads while it generates, and the next token after the commit is of the new weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    old = fleet.version or 0
    await slow(fleet, 0.05)
    async with agent(fleet, tiny_model) as (episode, ask):
        running = asyncio.create_task(ask(stream))
        async with asyncio.timeout(END):
            while not (await embedded(fleet)[0].loads()).running_requests:
                pass
        report = await fleet.publish(tensors(model), old + 1)
        await slow(fleet, 0.0)
        status, _ = await running
    sample, tokens = only(episode)
    assert (status, len(tokens), report.failed) == (200, TOKENS, {})
    spans = sample.episode.version_spans
    assert fleet.version is not None
    assert [span.version for span in spans] == [old, old + 1]
    first = int(sample.episode.loss_mask.argmax())
    assert [(span.start, span.end) for span in spans] == [(first, spans[0].end), (spans[0].end, first + TOKENS)]


@KINDS
async def test_values_that_engines_refuse_are_errors_of_the_protocol(
    fleet: Fleet, tiny_model: Path, stream: bool
) -> None:
    async with agent(fleet, tiny_model) as (episode, ask):
        for more in ({"temperature": -1}, {"top_p": 7}, {"seed": -(10**30)}):
            status, message = await ask(stream, **more)
            assert (status, bool(message)) == (400, True), more
        assert (await ask(stream, max_tokens=10**9))[0] == 200
        status, message = await ask(stream, messages=[{**QUESTION, "content": "two " * 5000}])
        assert status == 400
        assert "maximum context length" in message
    assert len(episode.samples()) == 1
