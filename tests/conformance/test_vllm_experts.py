"""Stock vLLM returns the experts that it routes tokens to, and the trainer replays them. On the CPU, it needs Triton's
interpreter for that."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import VLLMEngineConfig
from millrace.conformance import Runner
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.errors import LaunchError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.experts import ReturnsExperts, make_expert_folders
from tests.conformance.run_checks import START_TIMEOUT, make_runner
from tests.triton import install_triton

# Slow: the interpreter makes 20 tokens a second.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_expert_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config(vllm_python: Path) -> VLLMEngineConfig:
    return VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        threads=1,
        start_timeout=START_TIMEOUT,
        return_routed_experts=True,
        engine_args={"max_model_len": 192},  # the interpreter makes 20 tokens a second
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    config: VLLMEngineConfig, vllm_python: Path, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    interpreted = config.model_copy(update={"env": install_triton(vllm_python, tmp_path_factory.mktemp("triton"))})
    async with open_fleet(interpreted, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, folders: tuple[Path, Path]) -> Runner:
    return await make_runner(fleet, *folders)


class TestVLLM(ReturnsExperts):
    """The tests of routed experts, with the fixtures of this module."""


async def test_without_triton_the_start_fails_and_says_so(
    config: VLLMEngineConfig, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(LaunchError, match="Model Runner V2 requires Triton"):
        await start(config, LaunchSpec(model_path=folders[0], log_dir=tmp_path))
