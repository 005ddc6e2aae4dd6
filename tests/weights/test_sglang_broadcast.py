"""Publishing by gloo to real SGLang, whose ranks receive and load the buckets by Millrace's weight loader."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.types import Capability
from millrace.weights.transports.process_group import GlooTransport
from millrace.weights.transports.whole_broadcast import WholeBroadcastTransport
from tests.architectures import make_moe_folder
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.broadcasts import Trainer, check_goes_on_after_dead_trainers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "model"
    make_moe_folder(folder)
    return folder


@asynccontextmanager
async def served(python: Path, version: str, folder: Path, logs: Path, *, loader: bool = True) -> AsyncIterator[Engine]:
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        python=python,
        version=version,
        threads=1,
        start_timeout=START_TIMEOUT,
        engine_args={} if loader else {"custom_weight_loader": None},
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=logs))
    try:
        yield started.engine
    finally:
        await started.end()


@pytest.mark.parametrize("version", ["0.5.23", pytest.param("0.5.15", marks=pytest.mark.slow)])
async def test_versions_come_by_whole_buckets(
    version: str, sglang_python: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    async with served(sglang_python(version), version, folder, tmp_path) as engine:
        async with Trainer(engine, folder) as trainer:
            assert isinstance(trainer.transport, WholeBroadcastTransport)
            await trainer.publish_both()  # the first one is recorded, the second one repeats the plans
        assert "more than copy" not in (tmp_path / "sglang-0.log").read_text()
        await check_goes_on_after_dead_trainers(engine, folder, trainer)


@pytest.mark.slow
async def test_a_server_without_the_loader_gets_single_tensors(
    sglang_python: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    async with (
        served(sglang_python("0.5.23"), "0.5.23", folder, tmp_path, loader=False) as engine,
        Trainer(engine, folder) as trainer,
    ):
        assert not {Capability.WHOLE_BROADCASTS, Capability.SAMPLED_CHECKSUMS} & trainer.target.info.capabilities
        assert isinstance(trainer.transport, GlooTransport)
        await trainer.publish_both()
