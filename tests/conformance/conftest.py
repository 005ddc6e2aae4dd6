"""A second model of the same shapes, and servers to examine."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.config.engines import EngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.conformance import Subject
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.launch.ports import free_port
from millrace.launch.process import ServerProcess
from millrace.train.tiny import make_tiny_model
from millrace.types import Health

# A context that is long enough to catch a generation in flight, even if the engine is fast and the test is slow.
TINY = TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=512)
API_KEY, ADMIN_KEY = "the-data-key", "the-control-key"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with that context."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(TINY, 0, folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other weights of the same shapes as `tiny_model`."""
    folder = tmp_path_factory.mktemp("other") / "model"
    make_tiny_model(TINY, 1, folder)
    return folder


@asynccontextmanager
async def examined(config: EngineConfig, model: Path, other: Path, logs: Path) -> AsyncIterator[Subject]:
    """Starts a server of `model` and yields it as the subject of checks. The server ends with the context."""
    started = await start(config, LaunchSpec(model_path=model, log_dir=logs))
    assert started.process is not None
    try:
        yield Subject(started.engine, started.info, model, other)
    finally:
        await started.end()


@asynccontextmanager
async def embedded_server(model: Path, logs: Path, *options: str) -> AsyncIterator[str]:
    """Starts an embedded engine as a server that Millrace did not launch, with known keys. Yields its URL."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "millrace.engines.embedded", "--model", str(model), "--port", str(port)]
    process = await ServerProcess.start(
        "embedded",
        [*command, "--threads", "1", *options],
        logs / "embedded.log",
        env={"MILLRACE_API_KEY": API_KEY, "MILLRACE_ADMIN_API_KEY": ADMIN_KEY},
    )
    engine = EmbeddedEngine("embedded", url, api_key=API_KEY, admin_key=ADMIN_KEY)

    async def healthy() -> bool:
        return await engine.health() is Health.READY

    try:
        await process.until_healthy(healthy, deadline=60)
        yield url
    finally:
        await engine.close()
        await process.end()
