"""What verl's agent loops call, on real engines: retries, aborts, and the gate that verl closes for a weight update."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from verl.workers.rollout.replica import TokenOutput

from millrace import EmbeddedEngineConfig, Fleet, open_fleet
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import EngineError
from millrace.integrations.verl.server import MillraceServer, Serving

SERVING = Serving(prompt=40, response=200, context=None, ignore_eos=True, seed=None, retries=2, timeout=60.0)
PROMPT = list(range(20, 30))
SLOW = 0.05  # seconds for each token


@pytest.fixture
async def fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two engines, with weights of the trainer's step 7."""
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True, start_timeout=300)
    async with open_fleet(config, tiny_model, log_dir=tmp_path, restarts=2) as opened:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        await opened.publish(lambda: list(model.named_parameters()), label=7)
        yield opened


@asynccontextmanager
async def serving(fleet: Fleet, settings: Serving = SERVING) -> AsyncIterator[MillraceServer]:
    async with fleet.share() as shared:
        server = MillraceServer(settings)
        await server.follow(shared.url, shared.key)
        try:
            yield server
        finally:
            await server.close()


async def generate(server: MillraceServer, tokens: int, **params: Any) -> TokenOutput:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    return await server.generate(
        prompt_ids=PROMPT,
        sampling_params={**sampling, "max_tokens": tokens, **params},
        request_id=f"r{next(NUMBERS)}",
        image_data=None,
        video_data=None,
    )


NUMBERS = iter(range(10_000))


def embedded(fleet: Fleet) -> list[EmbeddedEngine]:
    engines = list(fleet.engines.values())
    return [engine for engine in engines if isinstance(engine, EmbeddedEngine)]


async def slow(fleet: Fleet, seconds: float) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=seconds)


async def running(fleet: Fleet, requests: int) -> None:
    """Wait until the engines run this many requests, and have made two tokens for each."""
    async with asyncio.timeout(60):
        while True:
            loads = [await engine.loads() for engine in embedded(fleet)]
            tokens = sum(load.used_tokens for load in loads)
            if sum(load.running_requests for load in loads) == requests and tokens >= requests * (len(PROMPT) + 2):
                return
            await asyncio.sleep(0.01)


async def test_a_completion_has_its_tokens_logprobs_and_step(fleet: Fleet) -> None:
    async with serving(fleet) as server:
        output = await generate(server, 12)
        assert (len(output.token_ids), len(output.log_probs), output.stop_reason) == (12, 12, "completed")
        assert {output.extra_fields[f"{which}global_steps"] for which in ("", "min_", "max_")} == {7}
        assert (await generate(server, 3, logprobs=False)).log_probs is None
        assert len((await generate(server, 500)).token_ids) == fleet.context_length - len(PROMPT)
        with pytest.raises(ValueError, match="takes text only"):
            await server.generate(PROMPT, {}, "r", image_data=["an image"])


async def test_an_engine_that_dies_costs_a_retry(fleet: Fleet) -> None:
    async with serving(fleet) as server:
        await embedded(fleet)[0].inject_fault("crash", after_tokens=20)
        outputs = await asyncio.gather(*(generate(server, 60) for _ in range(4)))
        for output in outputs:
            assert (len(output.token_ids), len(output.log_probs), output.stop_reason) == (60, 60, "completed")


async def test_without_a_retry_the_engine_s_error_is_raised(fleet: Fleet) -> None:
    async with serving(fleet, replace(SERVING, retries=0)) as server:
        for engine in embedded(fleet):
            await engine.inject_fault("crash", after_tokens=20)
        with pytest.raises(EngineError):
            await generate(server, 60)


async def test_requests_are_aborted_and_wait_until_generation_is_resumed(fleet: Fleet) -> None:
    async with serving(fleet) as server:
        await slow(fleet, SLOW)
        cut = [asyncio.create_task(generate(server, 200)) for _ in range(4)]
        await running(fleet, 4)
        await server.abort_all_requests()
        for output in await asyncio.gather(*cut):
            assert output.stop_reason == "aborted"
            assert 0 < len(output.token_ids) < 200
            assert len(output.log_probs) == len(output.token_ids)
        await slow(fleet, 0.0)
        waiting = asyncio.create_task(generate(server, 5))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
        await server.resume_generation()
        assert len((await waiting).token_ids) == 5


async def test_a_server_that_leaves_rejects_requests(fleet: Fleet) -> None:
    async with serving(fleet) as server:
        await server.abort_all_requests(reject_request=True)
        output = await generate(server, 5)
        assert (output.token_ids, output.stop_reason) == ([], "aborted")
        assert output.extra_fields["global_steps"] == 7
        await server.resume_generation()
        assert len((await generate(server, 5)).token_ids) == 5


async def test_a_server_waits_for_its_fleet(fleet: Fleet) -> None:
    """Standalone replicas get requests only after the first weights, and the fleet is opened for these."""
    server = MillraceServer(SERVING)
    waiting = asyncio.create_task(generate(server, 5))
    await asyncio.sleep(0)
    async with fleet.share() as shared:
        await server.follow(shared.url, shared.key)
        assert len((await waiting).token_ids) == 5
        await server.close()
