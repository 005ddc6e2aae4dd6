"""Stock vLLM, started for adapters, does what the contract says."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.models import VLLMEngineConfig
from millrace.config.routers import VLLMRouterConfig
from millrace.conformance import Check, Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.frozen import hold_a_judge_comes_back_from_its_folder
from tests.conformance.hold import (
    START_TIMEOUT,
    every_check,
    hold,
    hold_after_a_trainer_died,
    hold_its_dtype_is_read,
    hold_its_routes_say_what_it_is,
    runner_on,
)
from tests.conformance.kv_events import hold_its_events_draw_requests
from tests.conformance.lora import (
    WITH_LORA,
    hold_publishes_over_whole_versions,
    hold_what_a_dead_trainer_left_is_taken_away,
)
from tests.conformance.nan import hold_nan_is_the_weights_fault
from tests.conformance.sampling import hold_it_samples_as_transformers_would
from tests.routers.hold import hold_a_router_before_it

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = frozenset({
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.torch_storage",
})  # fmt: skip


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
    return await runner_on(fleet, tiny_model, other_model)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await hold(runner, check, LACKING)


async def test_it_samples_as_transformers_would(runner: Runner, tiny_model: Path) -> None:
    await hold_it_samples_as_transformers_would(runner.subject.engine, tiny_model)


async def test_a_trainer_publishes_adapters_over_whole_versions(fleet: Fleet, tiny_model: Path) -> None:
    await hold_publishes_over_whole_versions(fleet, tiny_model)


async def test_who_attaches_takes_away_the_adapters_that_a_dead_trainer_left(fleet: Fleet) -> None:
    await hold_what_a_dead_trainer_left_is_taken_away(fleet)


async def test_a_router_stands_before_it(
    fleet: Fleet, tiny_model: Path, router_python: Callable[[str], Path], tmp_path: Path
) -> None:
    config = VLLMRouterConfig(kind="vllm", python=router_python("vllm"))
    await hold_a_router_before_it(fleet, tiny_model, config, tmp_path, 2500)


async def test_its_events_draw_requests(fleet: Fleet, tiny_model: Path) -> None:
    await hold_its_events_draw_requests(fleet, tiny_model, 2600)


async def test_nan_is_the_weights_fault(fleet: Fleet, tiny_model: Path) -> None:
    await hold_nan_is_the_weights_fault(fleet, tiny_model, 2700)


async def test_a_judge_comes_back_from_its_folder(fleet: Fleet, tiny_model: Path) -> None:
    await hold_a_judge_comes_back_from_its_folder(fleet, tiny_model)


async def test_an_update_that_a_dead_trainer_left_open_bars_nobody(runner: Runner) -> None:
    await hold_after_a_trainer_died(runner)


async def test_its_routes_say_what_it_is(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await hold_its_routes_say_what_it_is(fleet, monkeypatch)


async def test_its_dtype_is_read_and_not_contradicted(fleet: Fleet, tiny_model: Path) -> None:
    await hold_its_dtype_is_read(fleet, VLLMEngineConfig(kind="vllm", device="cpu"), tiny_model)
