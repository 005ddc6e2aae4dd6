"""Stock vLLM with two data-parallel ranks, over which the experts of a mixture are spread. Each rank is a worker of its
own engine core, has half of the experts and all of the other weights. Weights come by every transport."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import VLLMEngineConfig
from millrace.config.models import TransportName
from millrace.conformance import Check, Runner
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import EngineFailed, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import FinishReason, GenerateRequest, Generation, Health, SamplingParams
from millrace.weights.sidecar.server import SIDECAR_KEY
from tests.collectives import install_collectives
from tests.conformance.ranks import (
    DEADLINE,
    RANKS,
    check_ranks_hold_their_experts,
    check_weights_come,
    make_spread_folders,
)
from tests.conformance.run_checks import (
    START_TIMEOUT,
    VLLM_UPDATES,
    WITHOUT_EXPERTS,
    WITHOUT_IMAGES,
    WITHOUT_LORA,
    WITHOUT_OFFLOAD,
    every_check,
    make_runner,
    run_check,
)
from tests.conformance.sampling import check_samples_as_transformers_would
from tests.engines.processes import below, command_lines
from tests.weights.variants import read_folder

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

LACKING = WITHOUT_IMAGES | WITHOUT_OFFLOAD | WITHOUT_EXPERTS | WITHOUT_LORA | VLLM_UPDATES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_spread_folders(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    vllm_python: Path, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    config = VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        dp_size=RANKS,
        ep_size=RANKS,
        threads=1,
        start_timeout=START_TIMEOUT,
        env=install_collectives(tmp_path_factory.mktemp("collectives")),
    )
    async with open_fleet(config, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, folders: tuple[Path, Path]) -> Runner:
    return await make_runner(fleet, *folders)


@pytest.fixture
def engine(fleet: Fleet) -> VLLMEngine:
    [engine] = fleet.engines.values()
    assert isinstance(engine, VLLMEngine)
    return engine


async def test_every_rank_has_its_experts_and_answers_for_them(engine: VLLMEngine) -> None:
    await check_ranks_hold_their_experts(engine)
    assert [state["rank"] for state in await engine._extension.call("millrace_state")] == [0, 1]
    load = await engine.loads()
    assert 0 <= load.used_tokens <= load.max_tokens


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, LACKING)


async def test_it_samples_as_transformers_would(engine: VLLMEngine, folders: tuple[Path, Path]) -> None:
    await check_samples_as_transformers_would(engine, folders[0])


@pytest.mark.parametrize("name", ["shm", "gloo", "ucx"])
async def test_weights_come_by_every_transport(
    name: TransportName, engine: VLLMEngine, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIDECAR_KEY, "the key")
    version = await check_weights_come(engine, name, folders)
    assert [state["version"] for state in await engine._extension.call("millrace_state")] == [str(version)] * RANKS


async def test_a_rank_that_refuses_is_named(engine: VLLMEngine) -> None:
    with pytest.raises(EngineFailed, match="rank 0: no update is open"):
        await engine._extension.call("millrace_load", "{}")
    with pytest.raises(EngineFailed, match=r"500.*data-parallel rank 0: .*; data-parallel rank 1: "):
        await engine._extension.call("millrace_unknown")
    assert await engine.health() is Health.READY


async def test_requests_of_all_ranks_are_aborted_and_all_caches_dropped(engine: VLLMEngine) -> None:
    """vLLM gives each of two equal requests at once to another rank."""
    first, second = (tuple(range(start, start + 64)) for start in (10, 100))

    async def generate(prompt: tuple[int, ...], tokens: int) -> Generation:
        sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
        return await engine.generate(GenerateRequest(prompt, sampling), deadline=DEADLINE)

    tasks = [asyncio.create_task(generate(prompt, 400)) for prompt in (first, first, second, second)]
    while (await engine.loads()).running_requests < len(tasks):
        assert not any(task.done() for task in tasks)
    await engine.abort()
    assert {(await task).finish_reason for task in tasks} == {FinishReason.ABORT}
    assert (await generate(first, 1)).cached_tokens
    await engine.flush_cache()
    assert not any(made.cached_tokens for made in await asyncio.gather(generate(first, 1), generate(second, 1)))


async def test_the_engine_is_dead_if_one_rank_is(fleet: Fleet, engine: VLLMEngine, folders: tuple[Path, Path]) -> None:
    """This is the last test: it ends the server."""
    [worker] = [pid for pid in below(os.getpid()) if "VLLM::Worker_DP1" in command_lines({pid})]
    os.kill(worker, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        while await engine.health() is not Health.DEAD:
            await asyncio.sleep(0.1)
    version = (fleet.version or 0) + 100
    with pytest.raises(PublishError, match=f"no engine took version {version}"):
        await fleet.publish(list(read_folder(folders[0]).items()), version)
