"""Stock SGLang returns the experts that it routes tokens to, and the trainer replays them."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.conformance import Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.experts import ReturnsExperts, make_expert_folders
from tests.conformance.run_checks import START_TIMEOUT, make_runner

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_expert_folders(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["0.5.23", pytest.param("0.5.15", marks=pytest.mark.slow)]
)
async def fleet(
    request: pytest.FixtureRequest,
    folders: tuple[Path, Path],
    sglang_python: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Fleet]:
    version: str = request.param
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        version=version,
        python=sglang_python(version),
        threads=1,
        start_timeout=START_TIMEOUT,
        return_routed_experts=True,
    )
    async with open_fleet(config, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, folders: tuple[Path, Path]) -> Runner:
    return await make_runner(fleet, *folders)


class TestSGLang(ReturnsExperts):
    """The tests of routed experts, with the fixtures of this module."""
