"""Publishes over UCX to real engines by sidecars. Two addresses of this machine stand for hosts."""

import asyncio
import base64
import itertools
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import aiohttp
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.checksum import tensor_checksum
from millrace.cli.sidecar import sidecar as command
from millrace.config import EmbeddedEngineConfig
from millrace.config.models import PublishConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.errors import ConfigError, EngineError, EngineRefused, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import transport_for
from millrace.types import Capability
from millrace.weights.folder import folder_checksums
from millrace.weights.sidecar.messages import (
    Form,
    Handle,
    MemoryFileHandle,
    PullBody,
    Pulled,
    Source,
    TorchStorageHandle,
)
from millrace.weights.sidecar.pulling import Pulling
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.fan_out import LEAST_PATIENCE
from millrace.weights.transports.registry import create
from millrace.weights.transports.shared_memory import MemoryFile
from millrace.weights.transports.ucx import UcxSidecar, UcxTransport
from millrace.weights.ucx import Endpoint

Tensors = list[tuple[str, torch.Tensor]]
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
KEY = "the key"
CPU = torch.device("cpu")
SMALL = 64 * 1024  # bytes of a bucket; a version has several buckets, and some tensors are larger


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def stepped(tensors: Tensors, version: int) -> Tensors:
    noise = torch.Generator().manual_seed(version)
    return [(name, torch.randn(tensor.shape, generator=noise) * 0.1) for name, tensor in tensors]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIDECAR_KEY, KEY)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def sidecar() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str, key: str = KEY) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "millrace", "sidecar", *arguments]
        environment = {**os.environ, SIDECAR_KEY: key}
        out = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=out, stderr=out, text=True, env=environment))
        return started[-1]

    yield start_one
    for one in started:
        one.kill()
        # This does not wait for the end of the output, since torch's helper has it open too and stays for this process.
        one.wait(timeout=10)
        for stream in (one.stdout, one.stderr):
            assert stream is not None
            stream.close()


def url_of(sidecar: subprocess.Popen[str]) -> str:
    assert sidecar.stdout is not None
    line = sidecar.stdout.readline()
    assert "reads weights over UCX, to the CPU here" in line, line
    return line.split()[0]


class InterceptedTransport(UcxTransport):
    """Calls `on_delivery` once, after the next bucket has arrived at the sidecars and before an engine opens it."""

    on_delivery: Callable[[], object] | None = None

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        unreached = await super().deliver(targets, deadline=deadline)
        if self.on_delivery is not None:
            self.on_delivery()
            self.on_delivery = None
        return unreached


@asynccontextmanager
async def on_hosts(model: Path, logs: Path, sidecars: list[str]) -> AsyncIterator[tuple[Fleet, InterceptedTransport]]:
    """Like `open_fleet`, with an engine on the host of each sidecar."""

    async def start_one(replica: int) -> Replica:
        config = EmbeddedEngineConfig(kind="embedded", replicas=len(sidecars), threads=1, host=HOSTS[replica])
        return await start(config, LaunchSpec(model_path=model, replica=replica, log_dir=logs))

    started = await asyncio.gather(*(start_one(replica) for replica in range(len(sidecars))))
    chosen = transport_for("auto", started, None, sidecars)
    assert isinstance(chosen, UcxTransport)
    await chosen.close()
    urls = {one.engine.name: url for one, url in zip(started, sidecars, strict=True)}
    async with Fleet.open(started, transport := InterceptedTransport(urls, CPU, key=KEY), None, start_one) as fleet:
        await fleet.attest(folder_checksums(model), 0, model)
        yield fleet, transport


class WeightsWithAct:
    """Tensors that can be iterated again. `act` is called once, before the one in the middle is yielded."""

    def __init__(self, tensors: Tensors, act: Callable[[], object]) -> None:
        self._tensors, self._acts = tensors, [act]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, named in enumerate(self._tensors):
            if number == len(self._tensors) // 2 and self._acts:
                self._acts.pop()()
            yield named


def serving(fleet: Fleet) -> dict[str, int | None]:
    """Returns the version that each engine serves."""
    return {state.name: state.version if state.routable else None for state in fleet.snapshot.replicas}


@pytest.mark.slow
async def test_two_hosts_and_sidecars_that_die(
    tensors: Tensors, tiny_model: Path, tmp_path: Path, sidecar: Start, key: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert any(tensor.nbytes > SMALL for _, tensor in tensors)
    started = [sidecar("--host", host) for host in HOSTS[:2]]
    urls = [url_of(one) for one in started]

    def kill() -> None:
        started[1].kill()
        started[1].wait(timeout=10)

    with caplog.at_level("INFO", "millrace"):
        async with on_hosts(tiny_model, tmp_path, urls) as (fleet, transport):
            assert "weights go by ucx: there are sidecars" in caplog.text
            one, two = fleet.engines
            version = 0

            async def publish(
                act: Callable[[], object] = lambda: None, *, fails: str | None = None, deadline: float = 20.0
            ) -> str:
                nonlocal version
                version += 1
                sent = stepped(tensors, version)
                report = await fleet.publish(WeightsWithAct(sent, act), version, bucket_bytes=SMALL, deadline=deadline)
                assert list(report.failed) == ([fails] if fails else [])
                assert all(engine.collateral == (engine.engine == fails) for engine in report.engines)
                assert serving(fleet) == {name: None if name == fails else version for name in (one, two)}
                for name in {one, two} - {fails}:
                    assert await fleet.engines[name].checksums() == {n: tensor_checksum(t) for n, t in sent}
                assert fleet.snapshot.get(two).usable  # the engine itself has not failed, only its sidecar
                return str(report.failed.get(two, ""))

            await publish()
            await publish()
            begun = time.monotonic()
            hangs = await publish(lambda: started[1].send_signal(signal.SIGSTOP), fails=two, deadline=4.0)
            assert "did not answer within" in hangs
            assert time.monotonic() - begun < 4.0
            started[1].send_signal(signal.SIGCONT)
            await publish()
            transport.on_delivery = kill  # the data that it has read is gone with it, so its engine can't open it
            assert f"sidecar {urls[1]} did not bring a bucket: no server listens at" in await publish(fails=two)
            assert f"sidecar {urls[1]} did not bring a bucket: no server listens at" in await publish(fails=two)
            started[1] = sidecar("--host", HOSTS[1], "--port", urls[1].rpartition(":")[2])
            assert url_of(started[1]) == urls[1]
            await publish()
            for process in started:
                process.kill()
            with pytest.raises(PublishError, match="no engine took version 8"):
                await publish()


class WatchedSidecar(UcxSidecar):
    """Notes what each sidecar is asked to read, and calls `on_pulled` with the sidecar's URL when it has read."""

    asked: ClassVar[list[PullBody]] = []
    on_pulled: ClassVar[Callable[[str], object]] = lambda url: None

    async def pull(self, body: PullBody, *, deadline: float) -> Pulled:
        self.asked.append(body)
        pulled = await super().pull(body, deadline=deadline)
        type(self).on_pulled(self.name.removeprefix("sidecar "))
        return pulled


@pytest.mark.slow
async def test_hosts_read_from_each_other_and_from_the_trainer_if_one_hangs(
    tensors: Tensors, tiny_model: Path, tmp_path: Path, sidecar: Start, key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.weights.transports.ucx.UcxSidecar", WatchedSidecar)
    started = [sidecar("--host", host) for host in HOSTS]
    urls = [url_of(one) for one in started]
    hung: list[str] = []

    def stop(url: str) -> None:
        if not hung:
            hung.append(url)
            started[urls.index(url)].send_signal(signal.SIGSTOP)

    async with on_hosts(tiny_model, tmp_path, urls) as (fleet, transport):
        with monkeypatch.context() as patient:  # on a busy machine too, nobody gives up waiting for a source
            patient.setattr("millrace.weights.transports.fan_out.LEAST_PATIENCE", 60.0)
            transport._patience = 60.0
            await fleet.publish(tensors, 1, bucket_bytes=SMALL, deadline=60)
        asked = WatchedSidecar.asked
        addresses = Counter((body.slot, body.source.address) for body in asked)
        of_trainer = sum(count for _, count in addresses.most_common(2))  # from each of its two slots
        assert len(asked) % 3 == 0
        assert of_trainer == len(asked) * 2 // 3
        transport._patience = LEAST_PATIENCE
        monkeypatch.setattr(WatchedSidecar, "on_pulled", stop)
        sent = stepped(tensors, 2)
        report = await fleet.publish(sent, 2, bucket_bytes=SMALL, deadline=40)
        [failed] = report.failed
        assert failed == f"embedded-{urls.index(hung[0])}"
        for name in set(fleet.engines) - {failed}:
            assert serving(fleet)[name] == 2
            assert await fleet.engines[name].checksums() == {n: tensor_checksum(t) for n, t in sent}
        started[urls.index(hung[0])].send_signal(signal.SIGCONT)
        assert not (await fleet.publish(sent, 3, bucket_bytes=SMALL, deadline=40)).failed


class Trainer:
    """The trainer's side of a sidecar. Each of its slots is filled with one number."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self.endpoint = Endpoint(MemoryFile, CPU)

    def fill(self, value: int, nbytes: int, slot: int = 0) -> dict[str, object]:
        """Fills a slot and returns the body of a pull."""
        self.endpoint.slot(slot, nbytes, unread=True).bytes.fill_(value)
        source = Source(agent=self.endpoint.metadata(), address=self.endpoint.region(slot).address, gpu=None)
        body = PullBody(
            session=self.endpoint.name, source=source, slot=slot, nbytes=nbytes, form=Form.MEMORY_FILE, shares=1,
            seconds=20.0, readable=0.001, unread=True,
        )  # fmt: skip
        return body.model_dump(mode="json")

    async def ask(self, body: object, path: str = "/pull", key: str = KEY) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.post(self._url + path, json=body, headers=headers) as response:
            return response.status, await response.text()

    async def pull(self, body: object) -> Handle:
        return (await self.pulled(body)).handle

    async def pulled(self, body: object) -> Pulled:
        status, text = await self.ask(body)
        assert status == 200, text
        return Pulled.model_validate_json(text)


@asynccontextmanager
async def trainer(url: str) -> AsyncIterator[Trainer]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        trainer = Trainer(session, url)
        yield trainer
        trainer.endpoint.close(unread=True)


def slots_of(process: subprocess.Popen[str]) -> int:
    """Returns how many memory files the process has open."""
    folder = Path("/proc", str(process.pid), "fd")
    return len({path.stat().st_ino for path in folder.iterdir() if "millrace-bucket" in os.readlink(path)})


def content(path: str, nbytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(nbytes)


def mapped(path: str, nbytes: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ)


async def test_a_sidecar_holds_only_open_sessions(sidecar: Start) -> None:
    process = sidecar()
    async with trainer(url := url_of(process)) as one, trainer(url) as two:
        body = one.fill(1, 4096)
        stranger = UcxSidecar(url, "another key")
        with pytest.raises(EngineRefused, match=f"needs the key in {SIDECAR_KEY}"):
            await stranger.pull(PullBody.model_validate_json(orjson.dumps(body)), deadline=5.0)
        await stranger.close(None, unread=True)
        assert (await one.ask(body, key="wrong"))[0] == 401
        assert (await one.ask({"session": one.endpoint.name, "unread": True}, "/end", key="wrong"))[0] == 401
        source = body["source"]
        assert isinstance(source, dict)
        wrong: list[dict[str, object]] = [
            {"slot": 2},
            {"nbytes": 0},
            {"source": {**source, "address": "1"}},
            {"source": {**source, "gpu": -1}},
            {"file": "/"},
        ]
        for change in wrong:
            assert (await one.ask({**body, **change}))[0] == 400
        status, text = await one.ask({**body, "form": "cuda_ipc"})
        assert status == 400
        assert "its memory is on the cpu, but the engines here open cuda_ipc: start it with --device cuda" in text
        unreadable: list[dict[str, object]] = [
            {"source": {**source, "agent": base64.b64encode(b"rubbish").decode()}},
            {"source": {**source, "address": 4096}},
            {"seconds": 1e-9},
        ]
        for change in unreadable:
            status, text = await one.ask({**body, **change})
            assert status == 500
            assert "the bucket was not read: " in text

        for slot, value, nbytes in [(0, 1, 4096), (1, 2, 8192), (0, 3, 65536), (1, 4, 4096)]:  # slot 0 grows
            handle = await one.pull(one.fill(value, nbytes, slot))
            assert isinstance(handle, MemoryFileHandle)
            assert content(handle.path, nbytes) == bytes([value]) * nbytes
            assert slots_of(process) == 1 + min(value - 1, 1)
        storage = await one.pull({**one.fill(5, 4096), "form": "torch_storage"})
        assert isinstance(storage, TorchStorageHandle)
        opened = torch.UntypedStorage._new_shared_filename_cpu(storage.manager, storage.handle, storage.storage_bytes)
        assert bytes(opened)[:4096] == bytes([5]) * 4096
        assert slots_of(process) == 0

        await two.pull(two.fill(6, 4096))  # the trainer has started again, and its old session is gone
        assert slots_of(process) == 1
        assert await one.ask({"session": one.endpoint.name, "unread": True}, "/end") == (200, '{"success":true}')
        assert slots_of(process) == 1
        assert (await two.ask({"session": two.endpoint.name, "unread": True}, "/end"))[0] == 200
        assert slots_of(process) == 0


async def test_a_sidecar_reads_from_another_one(sidecar: Start) -> None:
    """If that one has ended, the engines beside the reader can still load the bucket before."""
    first, second = sidecar("--host", HOSTS[0]), sidecar("--host", HOSTS[1])
    async with trainer(url_of(first)) as one, trainer(url_of(second)) as two:
        nbytes = 65536
        of_first = (await one.pulled({**one.fill(1, nbytes), "readable": 60.0})).source
        relayed = {**one.fill(2, nbytes), "source": of_first.model_dump(mode="json")}  # the trainer's slot has changed
        handle = await two.pull(relayed)
        assert isinstance(handle, MemoryFileHandle)
        assert content(handle.path, nbytes) == bytes([1]) * nbytes
        first.kill()
        first.wait(timeout=10)
        status, text = await two.ask({**relayed, "slot": 1})
        assert status == 500
        assert "the bucket was not read: " in text
        assert content(handle.path, nbytes) == bytes([1]) * nbytes
        again = await two.pull(one.fill(3, nbytes, 1))
        assert isinstance(again, MemoryFileHandle)
        assert content(again.path, nbytes) == bytes([3]) * nbytes


async def test_what_another_sidecar_may_read_is_kept_until_it_can_not(sidecar: Start) -> None:
    process = sidecar()
    async with trainer(url_of(process)) as one, trainer(one._url) as two:
        await one.pull({**one.fill(1, 4096), "readable": 3.0})
        await two.pull(two.fill(2, 4096))  # another trainer
        assert slots_of(process) == 2
        async with asyncio.timeout(60):
            while slots_of(process) > 1:
                await asyncio.sleep(0.05)


async def test_memory_outlives_its_reader(sidecar: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP, a thread of UCX copies from the slot. If the slot or the agent were freed during the copy, this process
    could die."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    nbytes = 128 * 2**20
    process = sidecar()
    async with trainer(url_of(process)) as one:
        handle = await one.pull(one.fill(1, nbytes))
        assert isinstance(handle, MemoryFileHandle)
        theirs, values = mapped(handle.path, nbytes), itertools.count(2)

        async def stopped_halfway() -> tuple[int, asyncio.Task[tuple[int, str]]]:
            """Stops the sidecar in the middle of a pull. Returns the value that it reads, and the pull."""
            for value in itertools.islice(values, 10):
                pulling = asyncio.create_task(one.ask(one.fill(value, nbytes)))
                while theirs[0] != value:
                    await asyncio.sleep(0)
                process.send_signal(signal.SIGSTOP)
                if theirs[nbytes - 1] != value:
                    return value, pulling
                process.send_signal(signal.SIGCONT)  # the pull was done before the process stopped
                await pulling
            pytest.fail("it was never stopped in the middle")

        value, pulling = await stopped_halfway()
        one.endpoint.slot(0, 2 * nbytes, unread=False).bytes.fill_(0)
        process.send_signal(signal.SIGCONT)
        assert (await pulling)[0] == 200
        assert theirs[:] == bytes([value]) * nbytes

        value, pulling = await stopped_halfway()
        one.endpoint.close(unread=False)
        process.send_signal(signal.SIGCONT)
        assert (await pulling)[0] == 200
        assert theirs[:] == bytes([value]) * nbytes
        theirs.close()
        one.endpoint = Endpoint(MemoryFile, CPU)
        await one.pull(one.fill(99, nbytes))


def test_without_nixl_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    for build in (lambda: UcxTransport({"one": "http://127.0.0.2:9"}, CPU, key=None), lambda: Pulling(CPU)):
        with pytest.raises(ConfigError, match=r"pip install 'millrace\[ucx\]'"):
            build()


def test_the_command_does_one_of_two_things() -> None:
    for arguments, words in [
        ({"store": "versions"}, "--store needs --folder, and --folder needs --store"),
        ({"folder": Path("here")}, "--store needs --folder, and --folder needs --store"),
        ({"store": "versions", "folder": Path("here"), "device": "cpu"}, "--device is for ucx"),
        ({"device": "tpu"}, "--device tpu: "),
        ({"device": "meta"}, "--device meta: write cpu, cuda or cuda:N"),
    ]:
        with pytest.raises(ConfigError, match=words):
            command(**arguments)  # type: ignore[arg-type] # each has its own type


def test_sidecars_are_for_ucx_or_for_a_store() -> None:
    sidecars = ("http://127.0.0.2:9",)
    PublishConfig(transport="ucx", sidecars=sidecars)
    PublishConfig(transport="ucx", sidecars=sidecars, folder="versions")
    PublishConfig(sidecars=sidecars)
    with pytest.raises(ValueError, match=r"set publish\.transport to one of the two"):
        PublishConfig(sidecars=sidecars, folder="versions")
    with pytest.raises(ValueError, match=r"publish\.transport ucx needs publish\.sidecars"):
        PublishConfig(transport="ucx")


def test_each_engine_needs_a_sidecar() -> None:
    common = frozenset({Capability.UPDATE_FROM_SHARED_MEMORY})
    sidecars = {"one": "http://127.0.0.2:9", "two": None}
    with pytest.raises(PublishError, match=r"publish\.sidecars has no sidecar on the host of two, and ucx needs one"):
        create("ucx", TransportContext(capabilities=common, sidecars=sidecars))
