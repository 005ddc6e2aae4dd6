"""Real servers that compute prompts and generate apart serve as one replica of a fleet."""

from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import PrefillDecodeConfig
from millrace.engines.stock.interpreter import StockConfig
from millrace.errors import ConfigError, EngineRefused
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Health
from tests.fleet.prefill_decode import (
    DEADLINE,
    PROMPTS,
    Bounds,
    Made,
    asking,
    check_generates_as_a_lone_server,
    check_pause_and_abort,
    check_publish,
    check_recovery,
    config_on_cpu,
    engine_of,
    generated,
    generated_alone,
    make_models,
    require_same,
    tensors,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
EXACT = Bounds()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StockConfig:
    return config_on_cpu(request, tmp_path_factory.mktemp("nixl"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(
    config: StockConfig, models: Sequence[Path], tmp_path_factory: pytest.TempPathFactory
) -> Sequence[Made]:
    return await generated_alone(config, models, tmp_path_factory.mktemp("alone"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    config: StockConfig,
    models: Sequence[Path],
    alone: Sequence[Made],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Fleet]:
    decode = 2 if config.kind == "sglang" else 1
    pair = config.model_copy(update={"prefill_decode": PrefillDecodeConfig(decode=decode)})
    folder = tmp_path_factory.mktemp("versions")
    logs = tmp_path_factory.mktemp("logs")
    async with open_fleet(pair, models[0], log_dir=logs, folder=folder, restarts=2) as fleet:
        yield fleet


async def transferred(fleet: Fleet) -> float:
    """How often vLLM's decode server has fetched the KV cache of a prompt."""
    lines = str(await engine_of(fleet).servers[0]._ask("/metrics")).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:nixl_xfer_time_seconds_count"))


async def test_it_generates_what_a_lone_server_does(fleet: Fleet, alone: Sequence[Made]) -> None:
    await check_generates_as_a_lone_server(fleet, alone, EXACT)


async def test_prompts_are_computed_on_the_prefill_server(config: StockConfig, fleet: Fleet) -> None:
    if config.kind != "vllm":
        pytest.skip("SGLang's decode servers can't do without")
    before = await transferred(fleet)
    await generated(fleet)
    assert await transferred(fleet) >= before + len(PROMPTS)  # more if a lease expired, on a busy machine


async def test_other_processes_can_not_send_requests_to_sglang(config: StockConfig, fleet: Fleet) -> None:
    if config.kind != "sglang":
        pytest.skip("the decode servers of vLLM take requests by themselves")
    with pytest.raises(ConfigError, match="can't be shared: sglang-0 is several SGLang servers"):
        async with fleet.share():
            pass


async def test_a_request_for_more_top_logprobs_than_sglang_can_exchange_is_refused(
    config: StockConfig, fleet: Fleet
) -> None:
    if config.kind != "sglang":
        pytest.skip("it is for SGLang")
    for number, refused in ((128, False), (129, True)):
        request = replace(asking(PROMPTS[0]), extra={"top_logprobs_num": number})
        with pytest.raises(EngineRefused, match="at most 128") if refused else nullcontext():
            await fleet.generate(request, deadline=DEADLINE)


async def test_a_publish_reaches_both_sides(fleet: Fleet, models: Sequence[Path], alone: Sequence[Made]) -> None:
    await check_publish(fleet, models, alone, EXACT)


async def test_pauses_and_aborts_reach_both_sides(fleet: Fleet) -> None:
    await check_pause_and_abort(fleet, EXACT)


async def test_sleep_reaches_both_sides(fleet: Fleet, models: Sequence[Path], alone: Sequence[Made]) -> None:
    engine, version = engine_of(fleet), fleet.version
    assert version is not None
    await fleet.sleep()
    assert await engine.health() is Health.ASLEEP
    await fleet.wake()
    await fleet.publish(tensors(models[0]), version + 1)
    require_same(await generated(fleet), alone[0], version + 1, EXACT)


async def test_it_comes_back_as_a_whole_when_a_prefill_server_dies(fleet: Fleet, alone: Sequence[Made]) -> None:
    await check_recovery(fleet, alone[0], EXACT)
