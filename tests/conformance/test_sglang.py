"""Stock SGLang, in the versions that Millrace is tested on, does what the contract says."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.models import SGLangEngineConfig
from millrace.conformance import Check, Runner
from tests.conformance.conftest import examined
from tests.conformance.hold import START_TIMEOUT, WITHOUT_ADAPTERS, every_check, hold, hold_after_a_trainer_died

pytestmark = pytest.mark.asyncio(loop_scope="module")

LACKING = frozenset({
    *WITHOUT_ADAPTERS,  # see test_adapters.py
    "generate.seed",
    "generate.stop_ignoring_eos",
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.sampled_checksums",
    "update.shared_memory",
})  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["0.5.23", "0.5.15"])
async def runner(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    other_model: Path,
    sglang_python: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Runner]:
    version: str = request.param
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        version=version,
        python=sglang_python(version),
        threads=1,
        start_timeout=START_TIMEOUT,
    )
    async with examined(config, tiny_model, other_model, tmp_path_factory.mktemp("logs")) as subject:
        yield Runner(subject)


@every_check
async def test_it_does_what_the_contract_says(runner: Runner, check: Check) -> None:
    await hold(runner, check, LACKING)


async def test_an_update_that_a_dead_trainer_left_open_bars_nobody(runner: Runner) -> None:
    await hold_after_a_trainer_died(runner)
