"""The embedded engine does what the contract says."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import EmbeddedEngineConfig
from millrace.conformance import Check, Runner
from tests.conformance.conftest import examined
from tests.conformance.run_checks import WITHOUT_EXPERTS, WITHOUT_IMAGES, WITHOUT_OFFLOAD, every_check, run_check
from tests.conformance.sampling import check_samples_as_transformers_would

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = WITHOUT_IMAGES | WITHOUT_OFFLOAD | WITHOUT_EXPERTS | frozenset({
    "sampling.json_schema",
    "update.bare_nccl",
    "update.cuda_ipc",
    "update.own_checksums",
    "update.sampled_checksums",
    "update.told_before",
    "update.torch_storage",
    "update.torn",
    "update.whole_broadcasts",
})  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(
    tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Runner]:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with examined(config, tiny_model, other_model, tmp_path_factory.mktemp("logs")) as subject:
        yield Runner(subject)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, LACKING)


async def test_it_samples_as_transformers_would(runner: Runner, tiny_model: Path) -> None:
    await check_samples_as_transformers_would(runner.subject.engine, tiny_model)
