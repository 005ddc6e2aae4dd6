"""Publishing by gloo to real SGLang, whose ranks receive and load the buckets by Millrace's weight loader."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.base import Engine
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.types import Capability, Health
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.process_group import GlooTransport
from millrace.weights.transports.registry import create
from millrace.weights.transports.whole_broadcast import WholeBroadcastTransport
from tests.architectures import make_moe_folder
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.dying_trainer import BUCKET
from tests.weights.variants import PROMPTS, SHORT, NamedTensor, greedy, louder, read_folder

DEADLINE = 60.0
Tokens = list[tuple[int, ...]]


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


class Trainer:
    """Publishes versions to one engine, and knows the tokens of the weights in the folder.

    version: the last one. tokens: None if the engine serves the folder's weights now.
    """

    def __init__(self, engine: Engine, folder: Path, version: int = 0, tokens: Tokens | None = None) -> None:
        self.engine, self.version = engine, version
        self.own = list(read_folder(folder).items())
        self.other = louder(self.own)
        self._tokens = tokens

    async def __aenter__(self) -> "Trainer":
        self.target = PublishTarget(self.engine, await self.engine.info())
        self.transport: Transport = create("gloo", TransportContext(capabilities=self.target.info.capabilities))
        self.tokens = self._tokens or await self.made()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transport.close()

    async def made(self) -> Tokens:
        return [(await greedy(self.engine, prompt, "one", SHORT)).output_ids for prompt in PROMPTS]

    async def publish(self, tensors: list[NamedTensor]) -> None:
        self.version += 1
        await Publish(
            [self.target], source_of(tensors), self.version, self.transport, bucket_bytes=BUCKET, deadline=DEADLINE
        ).run()
        assert (await self.engine.info()).weight_version == self.version

    async def publish_both(self) -> None:
        """Publish other weights and then those of the folder, and require the tokens of each."""
        await self.publish(self.other)
        assert await self.made() != self.tokens
        await self.publish(self.own)
        assert await self.made() == self.tokens


@pytest.mark.parametrize("version", ["0.5.23", pytest.param("0.5.15", marks=pytest.mark.slow)])
async def test_versions_come_by_whole_buckets(
    version: str, sglang_python: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    async with served(sglang_python(version), version, folder, tmp_path) as engine:
        async with Trainer(engine, folder) as trainer:
            assert isinstance(trainer.transport, WholeBroadcastTransport)
            await trainer.publish_both()  # the first one is recorded, the second one repeats the plans
        assert "more than copy" not in (tmp_path / "sglang-0.log").read_text()
        last = trainer.version
        for number in (0, 2):
            await killed_trainer(engine, folder, last + 1, number)
            assert await engine.health(deadline=DEADLINE) in (Health.READY, Health.PAUSED)
            async with attached(engine, folder) as following, Trainer(following, folder, last, trainer.tokens) as later:
                await later.publish_both()
                last = later.version


@asynccontextmanager
async def attached(engine: Engine, folder: Path) -> AsyncIterator[Engine]:
    """The same server, as another trainer finds it."""
    assert isinstance(engine, SGLangEngine)
    other = SGLangEngine("sglang-0", engine.url, api_key=engine.api_key, admin_key=engine.admin_key, model_path=folder)
    await other.initialize()
    yield other
    await other.close()


async def killed_trainer(engine: Engine, folder: Path, version: int, number: int) -> None:
    """Run a trainer that dies at this broadcast of a publish."""
    assert isinstance(engine, SGLangEngine)
    arguments = (engine.url, engine.api_key or "", engine.admin_key or "", str(folder), str(version), str(number))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.weights.dying_trainer", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert output == b"dies\n"


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
