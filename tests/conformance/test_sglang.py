"""Stock SGLang, in the versions that Millrace is tested on, does what the contract says. One version is started for
adapters."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.config.routers import SGLangRouterConfig
from millrace.conformance import CHECKS, Check, Runner
from millrace.engines.stock.engine import StockEngine
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Capability
from tests.conformance.frozen import check_judge_is_restored
from tests.conformance.kv_events import check_routing_by_kv_events
from tests.conformance.lora import (
    MODULES,
    WITH_LORA,
    check_lora_publishes,
    check_stale_adapters_are_unloaded,
)
from tests.conformance.nan import check_nan_weights
from tests.conformance.run_checks import (
    START_TIMEOUT,
    WITHOUT_EXPERTS,
    WITHOUT_IMAGES,
    WITHOUT_LORA,
    WITHOUT_OFFLOAD,
    check_dtype_is_read,
    check_kind_is_found,
    check_update_after_a_trainer_died,
    every_check,
    make_runner,
    run_check,
)
from tests.conformance.sampling import check_samples_as_transformers_would
from tests.engines.processes import logs
from tests.routers.check_router import check_router

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = WITHOUT_IMAGES | WITHOUT_OFFLOAD | WITHOUT_EXPERTS | frozenset({
    "generate.seed",
    "generate.stop_ignoring_eos",
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.shared_memory",
})  # fmt: skip


VERSIONS: dict[str, dict[str, Any]] = {  # the engine_args of each version
    "0.5.23": {**WITH_LORA, "lora_target_modules": MODULES},
    "0.5.15": {"disable_overlap_schedule": True},
}
WITHOUT_PENALTIES = frozenset(check.name for check in CHECKS if Capability.PENALTIES in check.needs)
PARAMS = ["0.5.23", pytest.param("0.5.15", marks=pytest.mark.slow)]
started_for_lora = pytest.mark.parametrize("fleet", ["0.5.23"], indirect=True)


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PARAMS)
async def fleet(
    request: pytest.FixtureRequest, tiny_model: Path, sglang_python: Callable[[str], Path], log_dir: Path
) -> AsyncIterator[Fleet]:
    version: str = request.param
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        version=version,
        python=sglang_python(version),
        threads=1,
        start_timeout=START_TIMEOUT,
        kv_events=True,
        engine_args=VERSIONS[version],
    )
    async with open_fleet(config, tiny_model, log_dir=log_dir / version) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, tiny_model: Path, other_model: Path) -> Runner:
    return await make_runner(fleet, tiny_model, other_model)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    capabilities = runner.subject.info.capabilities
    lacking = LACKING if Capability.LORA in capabilities else LACKING | WITHOUT_LORA
    await run_check(runner, check, lacking if Capability.PENALTIES in capabilities else lacking | WITHOUT_PENALTIES)


async def test_it_samples_as_transformers_would(runner: Runner, tiny_model: Path) -> None:
    await check_samples_as_transformers_would(runner.subject.engine, tiny_model)


async def test_its_log_tells_no_key(fleet: Fleet, log_dir: Path) -> None:
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    [version] = [version for version in VERSIONS if version == (await engine.info()).engine_version]
    log = logs(log_dir / version)["sglang-0.log"]
    assert "api_key='***'" in log or "'api_key': '***'" in log
    assert {"data", "control"} <= engine._http._keys.keys()
    assert not [key for key in engine._http._keys.values() if key is None or key in log]


@started_for_lora
async def test_a_trainer_publishes_adapters_over_whole_versions(fleet: Fleet, tiny_model: Path) -> None:
    await check_lora_publishes(fleet, tiny_model)


@started_for_lora
async def test_attaching_unloads_the_adapters_of_a_dead_trainer(fleet: Fleet) -> None:
    await check_stale_adapters_are_unloaded(fleet)


@started_for_lora
async def test_it_serves_behind_a_router(
    fleet: Fleet, tiny_model: Path, router_python: Callable[[str], Path], tmp_path: Path
) -> None:
    config = SGLangRouterConfig(kind="sglang", python=router_python("sglang"))
    await check_router(fleet, tiny_model, config, tmp_path, 2500)


async def test_its_kv_events_draw_requests(fleet: Fleet, tiny_model: Path) -> None:
    await check_routing_by_kv_events(fleet, tiny_model, 2600)


@pytest.mark.parametrize("fleet", ["0.5.23"], indirect=True)  # 0.5.15 dies of NaN logits
async def test_nan_is_blamed_on_the_weights(fleet: Fleet, tiny_model: Path) -> None:
    await check_nan_weights(fleet, tiny_model, 2700)


async def test_a_judge_comes_back_from_its_folder(fleet: Fleet, tiny_model: Path) -> None:
    await check_judge_is_restored(fleet, tiny_model)


async def test_an_update_left_open_by_a_dead_trainer_blocks_no_other_client(runner: Runner) -> None:
    await check_update_after_a_trainer_died(runner)


async def test_its_kind_is_found_from_its_routes(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await check_kind_is_found(fleet, monkeypatch)


async def test_its_dtype_is_read_and_not_contradicted(fleet: Fleet, tiny_model: Path) -> None:
    await check_dtype_is_read(fleet, SGLangEngineConfig(kind="sglang", device="cpu"), tiny_model)
