"""Publishing by gloo to a real server, and trainers that die in the middle."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from millrace.engines.base import Engine
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.types import Health
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.registry import create
from tests.weights.dying_trainer import BUCKET
from tests.weights.variants import PROMPTS, SHORT, NamedTensor, greedy, louder, read_folder

DEADLINE = 60.0
Tokens = list[tuple[int, ...]]


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


async def check_goes_on_after_dead_trainers(engine: Engine, folder: Path, last: Trainer) -> None:
    """A trainer dies while the ranks wait for the first bucket, and one when they have received some. The next trainer
    publishes to the same server."""
    version = last.version
    for number in (0, 2):
        await killed_trainer(engine, folder, version + 1, number)
        assert await engine.health(deadline=DEADLINE) in (Health.READY, Health.PAUSED)
        async with attached(engine, folder) as following, Trainer(following, folder, version, last.tokens) as later:
            await later.publish_both()
            version = later.version


@asynccontextmanager
async def attached(engine: Engine, folder: Path) -> AsyncIterator[Engine]:
    """The same server, as another trainer finds it."""
    assert isinstance(engine, SGLangEngine | VLLMEngine)
    keys = {"api_key": engine.api_key, "admin_key": engine.admin_key}
    other = type(engine)(engine.name, engine.url, **keys, model_path=folder)
    try:
        await other.initialize()
        yield other
    finally:
        await other.close()


async def killed_trainer(engine: Engine, folder: Path, version: int, number: int) -> None:
    """Run a trainer that dies at this broadcast of a publish."""
    assert isinstance(engine, SGLangEngine | VLLMEngine)
    kind = engine.name.partition("-")[0]
    arguments = (kind, engine.url, engine.api_key or "", engine.admin_key or "", str(folder), str(version), str(number))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.weights.dying_trainer", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert output == b"dies\n"
