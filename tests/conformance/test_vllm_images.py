"""Stock vLLM reads images as transformers does."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import VLLMEngineConfig
from millrace.conformance import Check, Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.images import (
    check_a_publish_reaches_the_vision_tower,
    check_images_as_transformers_reads_them,
    check_wrong_images_are_named,
    every_image_check,
    make_vision_folders,
)
from tests.conformance.run_checks import START_TIMEOUT, make_runner, run_check
from tests.torchvision import install_torchvision

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_vision_folders(tmp_path_factory.mktemp("models"), request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    folders: tuple[Path, Path], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    config = VLLMEngineConfig(
        kind="vllm", device="cpu", python=vllm_python, threads=1, start_timeout=START_TIMEOUT, kv_events=True
    )
    with pytest.MonkeyPatch.context() as patch:
        # The lock file of vLLM for the CPU has no torchvision, which the processors of images need.
        patch.setenv("PYTHONPATH", str(install_torchvision(vllm_python, tmp_path_factory.mktemp("torchvision"))))
        async with open_fleet(config, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
            yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, folders: tuple[Path, Path]) -> Runner:
    return await make_runner(fleet, *folders)


@every_image_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, frozenset())


async def test_it_reads_images_as_transformers_does(fleet: Fleet, folders: tuple[Path, Path]) -> None:
    await check_images_as_transformers_reads_them(fleet, folders[0])


async def test_a_publish_reaches_the_vision_tower(fleet: Fleet, folders: tuple[Path, Path]) -> None:
    await check_a_publish_reaches_the_vision_tower(fleet, folders[0], 2500)


async def test_wrong_images_are_named(fleet: Fleet, folders: tuple[Path, Path]) -> None:
    await check_wrong_images_are_named(fleet, folders[0])
