"""Prefill and decode servers of SGLang and of vLLM do together what the contract says."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import PrefillDecodeConfig
from millrace.conformance import CHECKS, Check, Runner
from millrace.fleet.local import open_fleet
from millrace.types import Capability
from tests.conformance.run_checks import (
    VLLM_UPDATES,
    WITHOUT_EXPERTS,
    WITHOUT_IMAGES,
    WITHOUT_LORA,
    WITHOUT_OFFLOAD,
    every_check,
    make_runner,
    run_check,
)
from tests.fleet.prefill_decode import config_on_cpu

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

WITHOUT_KEEP = frozenset(check.name for check in CHECKS if Capability.PAUSE_KEEP in check.needs)
COMMON = WITHOUT_KEEP | WITHOUT_LORA | WITHOUT_OFFLOAD | WITHOUT_IMAGES | WITHOUT_EXPERTS
LACKING = {
    "sglang": COMMON
    | {
        "generate.seed",
        "generate.stop_ignoring_eos",
        "sampling.frequency_penalty",  # with overlap
        "sampling.presence_penalty",
        "sampling.repetition_penalty",
        "update.bare_nccl",  # on the CPU
        "update.checksums",
        "update.cuda_ipc",  # on the CPU
        "update.rollback",
        "update.shared_memory",
    },
    "vllm": COMMON | VLLM_UPDATES,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=LACKING)
async def runner(
    request: pytest.FixtureRequest, tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Runner]:
    config = config_on_cpu(request, tmp_path_factory.mktemp("nixl"))
    pair = config.model_copy(update={"prefill_decode": PrefillDecodeConfig()})
    async with open_fleet(pair, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield await make_runner(fleet, tiny_model, other_model)


@every_check
async def test_they_do_what_the_contract_says(runner: Runner, check: Check) -> None:
    await run_check(runner, check, LACKING[runner.subject.info.kind])
