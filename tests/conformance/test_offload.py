"""Stock engines that keep KV cache in host memory do what the contract says. Their copies to and from it are those of
`tests/sglang_offload` and `tests/vllm_offload`, because both engines have them for GPUs only."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from millrace.config.engines import EngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.conformance import Outcome, Runner, Subject, select
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import EngineRefused
from millrace.types import Capability
from tests.conformance.conftest import examined
from tests.conformance.run_checks import START_TIMEOUT

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
PLUGINS = Path(__file__).parents[1]
CHECKED = [*select("cache.*"), *select("version.*"), *select("sleep.*")]
LAYOUT = {"hicache_io_backend": "direct", "hicache_mem_layout": "layer_first"}  # of the copies of the tests


def sglang(python: Path, version: str) -> SGLangEngineConfig:
    return SGLangEngineConfig(
        kind="sglang",
        version=version,
        device="cpu",
        python=python,
        start_timeout=START_TIMEOUT,
        max_total_tokens=2048,  # little, so that other prompts soon take the room of one
        kv_offload_gb=1,
        env={"PYTHONPATH": str(PLUGINS / "sglang_offload")},
        engine_args=dict(LAYOUT),
    )


def vllm(python: Path, **engine_args: Any) -> VLLMEngineConfig:
    return VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=python,
        start_timeout=START_TIMEOUT,
        kv_cache_memory_bytes=4 * 1024 * 1024,
        kv_offload_gb=None if engine_args else 1,
        env={"PYTHONPATH": str(PLUGINS / "vllm_offload")},
        engine_args=engine_args,
    )


@pytest.fixture(scope="module", params=["sglang-0.5.23", "sglang-0.5.15", "vllm"])
def config(request: pytest.FixtureRequest, sglang_python: Callable[[str], Path], vllm_python: Path) -> EngineConfig:
    kind, _, version = str(request.param).partition("-")
    return sglang(sglang_python(version), version) if kind == "sglang" else vllm(vllm_python)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(
    config: EngineConfig, tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Subject]:
    async with examined(config, tiny_model, other_model, tmp_path_factory.mktemp("logs")) as subject:
        yield subject


async def test_no_prefix_outlives_its_version_in_host_memory(subject: Subject) -> None:
    assert Capability.KV_OFFLOAD in subject.info.capabilities
    runner = Runner(subject, deadline=120)
    results = [await runner.examine(check) for check in CHECKED]
    assert {result.check: result.reason for result in results if result.outcome is not Outcome.PASSED} == {}


class OnTheDeviceOnly(VLLMEngine):
    """Drops the prefixes on the device, and leaves those in host memory."""

    async def _flushed(self) -> bool:
        return bool((await self._control("/reset_prefix_cache", None))["success"])


@pytest.mark.parametrize("config", ["vllm"], indirect=True)
async def test_a_flush_of_the_device_only_is_found_out(subject: Subject) -> None:
    honest = subject.engine
    assert isinstance(honest, VLLMEngine)
    keys = honest._http._keys
    engine = OnTheDeviceOnly("forgetful", honest.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        (check,) = select("cache.offload")
        result = await Runner(Subject(engine, await engine.info(), subject.folder, subject.other)).examine(check)
        assert result.outcome is Outcome.FAILED
        assert "tokens are still cached (offload-flush)" in result.reason
    finally:
        await engine.close()


async def test_a_connector_that_keeps_old_prefixes_is_refused(
    vllm_python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # As text, which only the running server has read.
    connector = f'{{"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {{"shared_storage_path": "{tmp_path}"}}}}'  # noqa: E501
    with pytest.raises(EngineRefused, match="ExampleConnector keeps prefixes of old weights after a publish"):
        await start(
            vllm(vllm_python, kv_transfer_config=connector), LaunchSpec(model_path=tiny_model, log_dir=tmp_path)
        )
