"""Publishing by gloo to real vLLM, whose ranks receive whole buckets by Millrace's extension."""

from pathlib import Path

import pytest

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.weights.transports.whole_broadcast import WholeBroadcastTransport
from tests.architectures import OVER_TWO, make_moe_folder
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.broadcasts import Trainer, check_goes_on_after_dead_trainers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
async def test_versions_come_by_whole_buckets(ranks: int, vllm_python: Path, tmp_path: Path) -> None:
    """The server is a mixture of experts, whose layers are divided between the ranks."""
    folder = tmp_path / "model"
    make_moe_folder(folder, **OVER_TWO)
    config = VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        threads=1,
        start_timeout=START_TIMEOUT,
        tp_size=ranks,
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},  # otherwise it wants a NUMA node for each rank
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=tmp_path))
    try:
        engine = started.engine
        assert isinstance(engine, VLLMEngine)
        async with Trainer(engine, folder) as trainer:
            assert isinstance(trainer.transport, WholeBroadcastTransport)
            await trainer.publish_both()
            planned = [state["planned"] for state in await engine._extension.call("millrace_state")]
            await trainer.publish_both()
            assert [state["planned"] for state in await engine._extension.call("millrace_state")] == planned
        await check_goes_on_after_dead_trainers(engine, folder, trainer)
    finally:
        await started.end()
