"""Stock vLLM, started for adapters, does what the contract says."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import VLLMEngineConfig
from millrace.config.routers import VLLMRouterConfig
from millrace.conformance import Check, Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.frozen import check_judge_is_restored
from tests.conformance.kv_events import check_routing_by_kv_events
from tests.conformance.lora import (
    WITH_LORA,
    check_lora_publishes,
    check_stale_adapters_are_unloaded,
)
from tests.conformance.nan import check_nan_weights
from tests.conformance.run_checks import (
    START_TIMEOUT,
    VLLM_UPDATES,
    WITHOUT_EXPERTS,
    WITHOUT_IMAGES,
    WITHOUT_OFFLOAD,
    check_dtype_is_read,
    check_kind_is_found,
    check_update_after_a_trainer_died,
    every_check,
    make_runner,
    run_check,
)
from tests.conformance.sampling import check_samples_as_transformers_would
from tests.routers.check_router import check_router

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = WITHOUT_IMAGES | WITHOUT_OFFLOAD | WITHOUT_EXPERTS | VLLM_UPDATES


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        threads=1,
        start_timeout=START_TIMEOUT,
        kv_events=True,
        engine_args={**WITH_LORA},
    )
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, tiny_model: Path, other_model: Path) -> Runner:
    return await make_runner(fleet, tiny_model, other_model)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, LACKING)


async def test_it_samples_as_transformers_would(runner: Runner, tiny_model: Path) -> None:
    await check_samples_as_transformers_would(runner.subject.engine, tiny_model)


async def test_a_trainer_publishes_adapters_over_whole_versions(fleet: Fleet, tiny_model: Path) -> None:
    await check_lora_publishes(fleet, tiny_model)


async def test_attaching_unloads_the_adapters_of_a_dead_trainer(fleet: Fleet) -> None:
    await check_stale_adapters_are_unloaded(fleet)


async def test_it_serves_behind_a_router(
    fleet: Fleet, tiny_model: Path, router_python: Callable[[str], Path], tmp_path: Path
) -> None:
    config = VLLMRouterConfig(kind="vllm", python=router_python("vllm"))
    await check_router(fleet, tiny_model, config, tmp_path, 2500)


async def test_its_kv_events_draw_requests(fleet: Fleet, tiny_model: Path) -> None:
    await check_routing_by_kv_events(fleet, tiny_model, 2600)


async def test_nan_is_blamed_on_the_weights(fleet: Fleet, tiny_model: Path) -> None:
    await check_nan_weights(fleet, tiny_model, 2700)


async def test_a_judge_comes_back_from_its_folder(fleet: Fleet, tiny_model: Path) -> None:
    await check_judge_is_restored(fleet, tiny_model)


async def test_an_update_left_open_by_a_dead_trainer_blocks_no_other_client(runner: Runner) -> None:
    await check_update_after_a_trainer_died(runner)


async def test_its_kind_is_found_from_its_routes(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await check_kind_is_found(fleet, monkeypatch)


async def test_its_dtype_is_read_and_not_contradicted(fleet: Fleet, tiny_model: Path) -> None:
    await check_dtype_is_read(fleet, VLLMEngineConfig(kind="vllm", device="cpu"), tiny_model)
