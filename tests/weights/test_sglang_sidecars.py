"""Publishing to real SGLang by sidecars, loaded by Millrace's weight loader.

The server has this machine's own address, as on another host, so the loader does not answer to the trainer's process.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from millrace.buckets import DiskBucket
from millrace.config.engines import SGLangEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.errors import EngineError, PublishError
from millrace.model_folder import file_tensors
from millrace.train.tiny import make_tiny_model
from millrace.types import Capability
from millrace.weights.publisher import Publish
from millrace.weights.report import PublishReport
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.source import source_of
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.delta import DeltaTransport
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


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(sglang_python: Callable[[str], Path], folder: Path, logs: Path) -> AsyncIterator[Engine]:
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        host=socket.gethostbyname(socket.gethostname()),
        python=sglang_python(VERSION),
        version=VERSION,
        threads=1,
        start_timeout=START_TIMEOUT,
    )
    started = await start(config, LaunchSpec(model_path=folder, log_dir=logs))
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
    async with AsyncExitStack() as stack:
        url = stack.enter_context(sidecar("--device", "cpu"))
        context = TransportContext(capabilities=capabilities, sidecars={engine.name: url}, sidecar_key=KEY)
        transport = CorruptingTransport(create("ucx", context), tmp_path)
        stack.push_async_callback(transport.close)
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


def stepped(tensors: list[NamedTensor], version: int) -> list[NamedTensor]:
    """As after a step: a few elements of most tensors have changed, most of one tensor has, and one is as it was."""
    noise = torch.Generator().manual_seed(version)
    new = []
    for number, (name, tensor) in enumerate(tensors):
        flat = tensor.clone().reshape(-1)
        every = {0: 2, 1: flat.numel() + 1}.get((number + version) % 4, 64)
        flat[version % 64 :: every] += 0.3 * torch.randn(flat[version % 64 :: every].shape, generator=noise)
        new.append((name, flat.reshape(tensor.shape)))
    return new


class WatchedTransport(DeltaTransport):
    """Calls `on_delivery` once, with the file of the next version's changes, before an engine reads it."""

    on_delivery: Callable[[Path], None] | None = None

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        unreached = await super().deliver(targets, deadline=deadline)
        changes = self._bucket_for(targets[0]).changes
        if changes is not None and self.on_delivery is not None:
            self.on_delivery(Path(changes.path))
            self.on_delivery = None
        return unreached


def negated(path: Path) -> None:
    """Changes the sign of all values in a file of changes."""
    values = [one for name, one in file_tensors(path).items() if name.startswith("to/")]
    content = bytearray(path.read_bytes())
    for one in values:
        for index in range(one.begin + 3, one.end, 4):
            content[index] ^= 0x80
    path.write_bytes(content)


def reads_from_disk(log: Path) -> int:
    return log.read_text().count("POST /update_weights_from_disk")


async def test_a_delta_changes_only_what_has_changed(engine: Engine, folder: Path, logs: Path, tmp_path: Path) -> None:
    log = logs / "sglang-0.log"
    version = (await engine.info()).weight_version or 0
    tensors = louder(list(read_folder(folder).items()))
    store = VersionStore(str(tmp_path / "versions"), folder, keep=2, anchor_every=100)
    async with AsyncExitStack() as stack:
        url = stack.enter_context(sidecar("--store", str(tmp_path / "versions"), "--folder", str(tmp_path / "replica")))
        transport = WatchedTransport(store, {engine.name: url}, key=KEY)
        stack.push_async_callback(transport.close)

        async def step() -> Mapping[str, str]:
            """Publishes a version, and returns the engine's checksums."""
            nonlocal version, tensors
            version, tensors = version + 1, stepped(tensors, version + 1)
            await publish(engine, tensors, version, transport)
            store.secure(version)
            return await engine.checksums()

        before = reads_from_disk(log)
        await step()
        assert reads_from_disk(log) == before + 1
        checksums = [await step() for _ in range(3)]
        assert reads_from_disk(log) == before + 1
        assert len({tuple(one.items()) for one in checksums}) == 3

        await engine.sleep()
        await engine.wake()
        await step()
        assert reads_from_disk(log) == before + 2
        by_changes = await step()
        assert reads_from_disk(log) == before + 2
        version += 1
        await engine.begin_update(version)
        await engine.load(DiskBucket(str(tmp_path / "replica" / f"version-{version - 1:08d}")), deadline=60.0)
        await engine.commit()
        assert await engine.checksums() == by_changes

        await step()  # whole, because the server has read the folder by itself
        transport.on_delivery = negated
        with pytest.raises(PublishError, match="do not hold what is in"):
            await step()
        await step()
    store.close()
