"""Stock SGLang reads images as transformers does."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.conformance import Runner
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from tests.conformance.images import ReadsImages, make_vision_folders
from tests.conformance.run_checks import START_TIMEOUT, make_runner

# tests/gateway/test_images.py is quicker, and sends images to SGLang too.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


VARIANTS = [("0.5.23", "qwen3_vl"), ("0.5.23", "qwen2_5_vl"), ("0.5.15", "qwen2_5_vl")]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """SGLang's version, and the kind of the model."""
    version, kind = request.param
    return version, kind


@pytest.fixture(scope="module")
def folders(variant: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_vision_folders(tmp_path_factory.mktemp("models"), variant[1])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    variant: tuple[str, str],
    folders: tuple[Path, Path],
    sglang_python: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Fleet]:
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        version=variant[0],
        python=sglang_python(variant[0]),
        threads=1,
        start_timeout=START_TIMEOUT,
        kv_events=True,
    )
    async with open_fleet(config, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(fleet: Fleet, folders: tuple[Path, Path]) -> Runner:
    return await make_runner(fleet, *folders)


class TestSGLang(ReadsImages):
    """The engine's image tests, with the fixtures of this module."""
