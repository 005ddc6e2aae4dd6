"""Stock vLLM with two data-parallel ranks, over which the experts of a mixture are spread. Each rank is a worker of its
own engine core, has half of the experts and all of the other weights. Weights come by every transport."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from benchmarks.sidecar import sidecar
from transformers import AutoModelForCausalLM

from millrace.config.engines import VLLMEngineConfig
from millrace.config.models import TransportName
from millrace.conformance import Check, Runner
from millrace.engines.base import Engine
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import EngineFailed, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Capability, FinishReason, GenerateRequest, Generation, Health, SamplingParams
from millrace.weights.publisher import Publish
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create
from tests.architectures import OVER_TWO, make_moe_folder
from tests.collectives import install_collectives
from tests.conformance.run_checks import (
    START_TIMEOUT,
    WITHOUT_EXPERTS,
    WITHOUT_IMAGES,
    WITHOUT_LORA,
    every_check,
    make_runner,
    run_check,
)
from tests.conformance.sampling import check_samples_as_transformers_would, require_expected
from tests.engines.processes import below, command_lines
from tests.weights.variants import read_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

RANKS = 2
DEADLINE = 60.0
BUCKET = 64 * 1024  # bytes; a version has several buckets
LACKING = WITHOUT_IMAGES | WITHOUT_EXPERTS | WITHOUT_LORA | frozenset({
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.torch_storage",
})  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two mixtures of experts with other weights, which are so large that experts matter."""
    folders = tmp_path_factory.mktemp("own") / "model", tmp_path_factory.mktemp("other") / "model"
    for seed, folder in enumerate(folders):
        model = make_moe_folder(folder, **OVER_TWO)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return folders


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


async def test_every_rank_has_its_experts_and_answers_for_them(fleet: Fleet, engine: VLLMEngine) -> None:
    info = await engine.info()
    assert info.ranks == RANKS
    assert {Capability.UPDATE_FROM_SHARED_MEMORY, Capability.SAMPLED_CHECKSUMS} <= info.capabilities
    states = await engine._rpc("millrace_state")
    assert [state["rank"] for state in states] == [0, 1]
    checksums = await engine.checksums()
    of_ranks = [
        {name: value for key, value in checksums.items() if (name := key.removeprefix(f"rank{rank}:")) != key}
        for rank in range(RANKS)
    ]
    first, second = of_ranks
    assert first.keys() == second.keys()
    assert first
    assert {name for name in first if first[name] != second[name]} == {name for name in first if ".experts." in name}
    load = await engine.loads()
    assert 0 <= load.used_tokens <= load.max_tokens


@every_check
@pytest.mark.slow
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, LACKING)


@pytest.mark.slow
async def test_it_samples_as_transformers_would(engine: VLLMEngine, folders: tuple[Path, Path]) -> None:
    await check_samples_as_transformers_would(engine, folders[0])


@pytest.mark.parametrize("name", ["shm", "gloo", pytest.param("ucx", marks=pytest.mark.slow)])
async def test_weights_come_by_every_transport(
    name: TransportName, engine: VLLMEngine, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIDECAR_KEY, "the key")
    target = PublishTarget(engine, await engine.info())
    version = target.info.weight_version or 0
    with ExitStack() as stack:
        sidecars = {engine.name: stack.enter_context(sidecar("cpu"))} if name == "ucx" else {}
        way = create(name, TransportContext(capabilities=target.info.capabilities, sidecars=sidecars))
        try:
            for folder in reversed(folders):
                version += 1
                source = source_of(list(read_folder(folder).items()))
                publish = Publish([target], source, version, way, bucket_bytes=BUCKET, deadline=DEADLINE)
                assert not (await publish.run()).failed
                await require_served(engine, folder, version)
        finally:
            await way.close()
    assert [state["version"] for state in await engine._rpc("millrace_state")] == [str(version)] * RANKS


async def require_served(engine: Engine, folder: Path, version: int) -> None:
    """Requires what the folder's model in transformers would generate, of requests that vLLM spreads over its ranks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sampling = SamplingParams(8, temperature=0.0, ignore_eos=True)
    asked = [GenerateRequest((5 + number, 17, 300, 42), sampling) for number in range(6)]
    made = await asyncio.gather(*(engine.generate(one, deadline=DEADLINE) for one in asked))
    for request, generation in zip(asked, made, strict=True):
        assert [span.version for span in generation.version_spans] == [version]
        require_expected(model, request, generation, counts_prompt=True)


async def test_a_rank_that_refuses_is_named(engine: VLLMEngine) -> None:
    with pytest.raises(EngineFailed, match="rank 0: no update is open"):
        await engine._rpc("millrace_load", "{}")
    with pytest.raises(EngineFailed, match=r"500.*data-parallel rank 0: .*; data-parallel rank 1: "):
        await engine._rpc("millrace_unknown")
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
