"""Publishing to real SGLang by sidecars, loaded by Millrace's weight loader.

The server has this machine's own address, as on another host, so the loader does not answer to the trainer's process.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.config.models import TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.errors import PublishError
from millrace.train.tiny import make_tiny_model
from millrace.types import Capability
from millrace.weights.publisher import Publish
from millrace.weights.report import PublishReport
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.registry import create
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.corruption import CorruptingTransport, Corruption
from tests.weights.variants import PROMPTS, SHORT, NamedTensor, greedy, louder, read_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSION = "0.5.23"
KEY = "the key"
BUCKET = 256 * 1024  # bytes; a version has several buckets
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sidecars") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 0, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    sglang_python: Callable[[str], Path], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        host=socket.gethostbyname(socket.gethostname()),
        python=sglang_python(VERSION),
        version=VERSION,
        threads=1,
        start_timeout=START_TIMEOUT,
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=tmp_path_factory.mktemp("logs")))
    yield started.engine
    await started.end()


@contextmanager
def sidecar(*arguments: str) -> Iterator[str]:
    """Starts a sidecar and yields its URL."""
    command = [sys.executable, "-m", "millrace", "sidecar", *arguments]
    environment = {**os.environ, SIDECAR_KEY: KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.kill()


async def publish(engine: Engine, tensors: list[NamedTensor], version: int, transport: Transport) -> PublishReport:
    target = PublishTarget(engine, await engine.info())
    report = await Publish([target], source_of(tensors), version, transport, bucket_bytes=BUCKET, deadline=60.0).run()
    assert (await engine.info()).weight_version == version
    return report


async def made(engine: Engine) -> Tokens:
    return [(await greedy(engine, prompt, "one", SHORT)).output_ids for prompt in PROMPTS]


async def test_buckets_over_ucx_are_loaded_and_checked_by_the_loader(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    own, tokens = list(read_folder(folder).items()), await made(engine)
    capabilities = (await engine.info()).capabilities
    assert Capability.SAMPLED_CHECKSUMS in capabilities
    with sidecar("--device", "cpu") as url:
        context = TransportContext(capabilities=capabilities, sidecars={engine.name: url}, sidecar_key=KEY)
        transport = CorruptingTransport(create("ucx", context), tmp_path)
        await publish(engine, louder(own), 1, transport)
        assert await made(engine) != tokens
        await publish(engine, own, 2, transport)
        assert await made(engine) == tokens

        transport.corruption = Corruption(None)
        with pytest.raises(PublishError, match="tensors are not what was sent"):
            await publish(engine, louder(own), 3, transport)
        assert transport.done
        await publish(engine, own, 3, transport)
        assert await made(engine) == tokens
        await transport.close()
