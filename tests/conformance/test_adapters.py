"""Adapters on stock engines: what the contract says of them, and a trainer's publishes, on one server of each."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from millrace.config.models import EngineArgument, SGLangEngineConfig, VLLMEngineConfig
from millrace.conformance import CHECKS, Outcome, Runner, Subject
from millrace.engines.stock.engine import StockEngine
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import GenerateRequest, SamplingParams, Segment
from tests.adapters import CONFIG, adapter, merged
from tests.conformance.hold import START_TIMEOUT, WITHOUT_ADAPTERS
from tests.fleet.test_fleet import expected

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sglang", "vllm"])
async def fleet(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    config: SGLangEngineConfig | VLLMEngineConfig
    lora: dict[str, EngineArgument]
    if request.param == "sglang":
        python = request.getfixturevalue("sglang_python")("0.5.23")
        lora = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": [*MODULES]}
        config = SGLangEngineConfig(
            kind="sglang", device="cpu", python=python, threads=1, start_timeout=START_TIMEOUT, engine_args=lora
        )
    else:
        python = request.getfixturevalue("vllm_python")
        lora = {"enable_lora": True, "max_lora_rank": 8}
        config = VLLMEngineConfig(
            kind="vllm", device="cpu", python=python, threads=1, start_timeout=START_TIMEOUT, engine_args=lora
        )
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


def greedy(name: str, tokens: int = 12, lora_path: str | None = None) -> GenerateRequest:
    sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(name, (5, 17, 300, 42, 8), sampling, {"lora_path": lora_path} if lora_path else {})


async def test_it_does_what_the_contract_says_of_adapters(fleet: Fleet, tiny_model: Path, other_model: Path) -> None:
    [engine] = fleet.engines.values()
    runner = Runner(Subject(engine, await engine.info(), tiny_model, other_model))
    results = [await runner.examine(check) for check in CHECKS if check.name in WITHOUT_ADAPTERS]
    assert len(results) == 5
    assert [result for result in results if result.outcome is not Outcome.PASSED] == []


async def test_a_trainer_publishes_adapters_over_whole_versions(fleet: Fleet, tiny_model: Path) -> None:
    [engine] = fleet.engines.values()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole = [(name, parameter.detach() * 1.5) for name, parameter in model.named_parameters()]
    first, second = adapter(model, 1), adapter(model, 2)
    version = 1000
    await fleet.publish([(name, parameter.detach()) for name, parameter in model.named_parameters()], version)
    base = asyncio.create_task(fleet.generate(greedy("base", 150), deadline=120))
    while not (await engine.loads()).running_requests:
        await asyncio.sleep(0)
    report = await fleet.publish_adapter(first, version + 1, config=CONFIG)
    assert not report.failed
    running = asyncio.create_task(fleet.generate(greedy("running", 150), deadline=120))
    while (await engine.loads()).running_requests + base.done() < 2:
        await asyncio.sleep(0)
    await fleet.publish_adapter(second, version + 2, config=CONFIG)
    after = await fleet.generate(greedy("after"), deadline=120)
    assert (after.output_ids, after.segments) == (expected(merged(model, second)), (Segment(version + 2, 0, 12),))
    assert (await base).segments == (Segment(version, 0, 150),)
    assert (await base).output_ids[:12] == expected(model)
    assert (await running).segments == (Segment(version + 1, 0, 150),)
    assert (await running).output_ids[:12] == expected(merged(model, first))
    across = asyncio.create_task(fleet.generate(greedy("across", 200), deadline=120))
    while not (await engine.loads()).running_requests:
        await asyncio.sleep(0)
    await fleet.publish(whole, version + 3)
    segments = (await across).segments
    assert [segment.version for segment in segments] == [version + 2, version + 3]
    scaled = AutoModelForCausalLM.from_pretrained(tiny_model)
    scaled.load_state_dict(dict(whole), strict=False)
    assert (await fleet.generate(greedy("whole"), deadline=120)).output_ids == expected(scaled)


async def test_who_attaches_takes_away_what_a_dead_trainer_left(fleet: Fleet) -> None:
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    model = AutoModelForCausalLM.from_pretrained((await engine.info()).model_path)
    await fleet.publish_adapter(adapter(model, 1), 2000, config=CONFIG)
    [member] = fleet.snapshot.members
    assert member.adapter is not None
    keys = engine._http._keys
    second = type(engine)("second", engine.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        await second.settle()
        names = [model["id"] for model in (await second._ask("/v1/models"))["data"]]
        assert member.adapter not in names
    finally:
        await second.close()
