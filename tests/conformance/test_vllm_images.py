"""Stock vLLM reads images as transformers does."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import VLLMEngineConfig
from millrace.conformance import Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.images import ReadsImages, make_vision_folders
from tests.conformance.run_checks import START_TIMEOUT, make_runner
from tests.torchvision import install_torchvision

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
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


class TestVLLM(ReadsImages):
    """The engine's image tests, with the fixtures of this module."""
