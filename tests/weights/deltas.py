"""Publishes by delta to one real engine: what it writes, and what it finds out. The same for every kind of engine."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import torch

from millrace.buckets import DiskBucket
from millrace.config.sources import TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.start import Replica
from millrace.errors import EngineError, PublishError
from millrace.launch.process import ServerProcess
from millrace.model_folder import file_tensors
from millrace.train.tiny import make_tiny_model
from millrace.types import Capability
from millrace.weights.publisher import Publish
from millrace.weights.report import PublishReport
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.source import source_of
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget, Transport
from millrace.weights.transports.delta import DeltaTransport
from tests.engines.processes import below
from tests.weights.variants import NamedTensor, louder, read_folder

KEY = "the key"
BUCKET = 256 * 1024  # bytes; a version has several buckets
LARGE = 2**28  # bytes of memory that are a KV cache, and no small model's weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("sidecars") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 0, folder)
    return folder


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


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


class Deltas:
    """One engine, and the versions that it gets.

    tensors, version: the newest one. replica: the folder that the sidecar writes.
    """

    def __init__(
        self,
        started: Replica,
        version: int,
        folder: Path,
        store: VersionStore,
        transport: WatchedTransport,
        replica: Path,
    ) -> None:
        self.engine, self.started, self.transport, self.replica = started.engine, started, transport, replica
        self.tensors, self.version = louder(list(read_folder(folder).items())), version
        assert isinstance(started.process, ServerProcess)
        self._store, self.pid = store, started.process.pid

    async def step(self, *, only: str | None = None) -> Mapping[str, str]:
        """Publishes a version, in which one tensor or many have changed, and returns the engine's checksums."""
        self.version += 1
        new = stepped(self.tensors, self.version)
        if only is not None:
            new = [(name, tensor + (name == only)) for name, tensor in self.tensors]
        self.tensors = new
        await publish(self.engine, self.tensors, self.version, self.transport)
        self._store.secure(self.version)
        return await self.engine.checksums()

    @property
    def folder(self) -> Path:
        """The newest version, as the engine reads it."""
        return self.replica / f"version-{self.version:08d}"


@asynccontextmanager
async def opened(started: Replica, folder: Path, place: Path) -> AsyncIterator[Deltas]:
    """Opens a store and a sidecar for an engine that runs."""
    engine, versions, replica = started.engine, str(place / "versions"), place / "replica"
    store = VersionStore(versions, folder, keep=2, anchor_every=100)
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        url = stack.enter_context(sidecar("--store", versions, "--folder", str(replica)))
        transport = WatchedTransport(store, {engine.name: url}, key=KEY)
        stack.push_async_callback(transport.close)
        yield Deltas(started, (await engine.info()).weight_version or 0, folder, store, transport, replica)


async def check_only_changes_are_written(deltas: Deltas, log: Path) -> None:
    """log: the engine's."""

    def whole_reads() -> int:
        """Returns how many folders the engine has read whole so far. SGLang is asked for that, and vLLM says it."""
        text = log.read_text()
        return text.count("POST /update_weights_from_disk") + text.count(": of 0 of its ")

    engine, before = deltas.engine, whole_reads()
    await deltas.step()
    assert whole_reads() == before + 1
    checksums = [await deltas.step() for _ in range(3)]
    assert whole_reads() == before + 1
    assert len({tuple(one.items()) for one in checksums}) == 3

    if Capability.SLEEP in (await engine.info()).capabilities:
        await engine.sleep()
        await engine.wake()
        await deltas.step()
        assert whole_reads() == before + 2
    by_changes, before = await deltas.step(), whole_reads()
    folder = deltas.folder
    deltas.version += 1
    await engine.begin_update(deltas.version)
    await engine.load(DiskBucket(str(folder)), deadline=60.0)
    await engine.commit()
    assert await engine.checksums() == by_changes

    await deltas.step()  # whole, because the server has read the folder by itself
    assert whole_reads() == before + 2
    deltas.transport.on_delivery = negated
    with pytest.raises(PublishError, match="do not hold what is in"):
        await deltas.step()
    await deltas.step()
    assert whole_reads() == before + 3


async def check_a_changed_byte_is_found(deltas: Deltas, name: str) -> None:
    """name: a tensor that the engine holds as it was loaded."""
    for _ in range(3):
        await deltas.step()
    tensor = dict(deltas.tensors)[name]
    pids = {deltas.pid} | below(deltas.pid)
    rows = [tensor.reshape(-1)[:64].to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert sum(flip(pids, row.view(torch.uint8).numpy().tobytes()) for row in rows)
    with pytest.raises(PublishError, match="do not hold what is in"):
        await deltas.step(only="model.embed_tokens.weight")
    await deltas.step()


def flip(pids: set[int], content: bytes) -> int:
    """Changes the first byte of this content wherever it is in the own memory of processes. Returns the number of
    places."""
    places = 0
    for pid in pids:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                extent, mode, _, _, inode, *_ = line.split()
                begin, end = (int(text, 16) for text in extent.split("-"))
                if not mode.startswith("rw") or inode != "0" or end - begin > LARGE:
                    continue
                memory.seek(begin)
                block = memory.read(end - begin)
                found = block.find(content)
                while found >= 0:
                    memory.seek(begin + found)
                    memory.write(bytes([content[0] ^ 1]))
                    places, found = places + 1, block.find(content, found + 1)
    return places
