"""The one set of checks, on every engine that Millrace has an adapter for."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.models import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig
from millrace.conformance import CHECKS, Check, Outcome, Runner
from tests.conformance.conftest import examined

pytestmark = pytest.mark.asyncio(loop_scope="module")

START_TIMEOUT = 240.0  # 20 s on a quiet machine
ENGINES = ("embedded", "sglang 0.5.23", "sglang 0.5.15")

# What an engine can't do. Anything else that is lacking is an error: a check that can't be made proves nothing.
SGLANG_LACKS = {
    "generate.seed",
    "generate.stop_ignoring_eos",
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.rollback",
    "update.shared_memory",
}
EMBEDDED_LACKS = {"update.cuda_ipc", "update.own_checksums", "update.torch_storage", "update.torn"}
LACKING = {"embedded": EMBEDDED_LACKS, "sglang 0.5.23": SGLANG_LACKS, "sglang 0.5.15": SGLANG_LACKS}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def examination(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    other_model: Path,
    sglang_python: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[str, Runner]]:
    name: str = request.param
    config: EngineConfig = EmbeddedEngineConfig(kind="embedded", threads=1)
    if name != "embedded":
        version = name.removeprefix("sglang ")
        config = SGLangEngineConfig(
            kind="sglang",
            device="cpu",
            version=version,
            python=sglang_python(version),
            threads=1,
            start_timeout=START_TIMEOUT,
        )
    async with examined(config, tiny_model, other_model, tmp_path_factory.mktemp("logs")) as subject:
        yield name, Runner(subject)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_the_engine_does_what_the_contract_says(examination: tuple[str, Runner], check: Check) -> None:
    name, runner = examination
    result = await runner.examine(check)
    expected = Outcome.LACKING if check.name in LACKING[name] else Outcome.PASSED
    assert result.outcome is expected, result.reason
