"""No prefix outlives its version in host memory, with the copies of the engine's own kernels."""

import asyncio
from pathlib import Path

import pytest

from millrace.config.engines import SGLangEngineConfig
from millrace.conformance import Outcome, Runner, select
from millrace.engines.stock.interpreter import StockConfig
from tests.conformance.conftest import examined
from tests.conformance.conftest import other_model as other_model
from tests.conformance.conftest import tiny_model as tiny_model


def test_no_prefix_outlives_its_version_in_host_memory(
    config: StockConfig, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    sglang = isinstance(config, SGLangEngineConfig)
    if not sglang and config.version == "0.23.0":
        pytest.skip("vLLM 0.23 does not say whether it dropped its offloaded KV cache, so it takes no publish with one")
    # Little room on the device, so that other prompts soon take that of one.
    room = {"max_total_tokens": 2048} if sglang else {"kv_cache_memory_bytes": 4 * 1024 * 1024}

    async def hold() -> None:
        offloading = config.model_copy(update={"kv_offload_gb": 1, **room})
        async with examined(offloading, tiny_model, other_model, tmp_path) as subject:
            runner = Runner(subject, deadline=300)
            results = [await runner.examine(check) for check in (*select("cache.*"), *select("version.*"))]
        assert {result.check: result.reason for result in results if result.outcome is not Outcome.PASSED} == {}

    asyncio.run(hold())
