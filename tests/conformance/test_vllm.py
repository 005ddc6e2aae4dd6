"""Stock vLLM does what the contract says."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.models import VLLMEngineConfig
from millrace.conformance import Check, Runner
from tests.conformance.conftest import examined
from tests.conformance.hold import START_TIMEOUT, WITHOUT_ADAPTERS, every_check, hold, hold_after_a_trainer_died

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = frozenset({
    *WITHOUT_ADAPTERS,  # see test_adapters.py
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.torch_storage",
})  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(
    tiny_model: Path, other_model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Runner]:
    config = VLLMEngineConfig(kind="vllm", device="cpu", python=vllm_python, threads=1, start_timeout=START_TIMEOUT)
    async with examined(config, tiny_model, other_model, tmp_path_factory.mktemp("logs")) as subject:
        yield Runner(subject)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await hold(runner, check, LACKING)


async def test_an_update_that_a_dead_trainer_left_open_bars_nobody(runner: Runner) -> None:
    await hold_after_a_trainer_died(runner)
