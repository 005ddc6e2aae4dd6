"""Publishes deltas to real engines by sidecars. Two addresses of this machine stand for two hosts."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.config.models import PublishConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet, transport_for
from millrace.model_folder import stored_tensors
from millrace.types import EngineInfo, GenerateRequest, SamplingParams
from millrace.weights.folder import folder_checksums
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.delta import DeltaTransport
from millrace.weights.transports.sidecars import EngineSidecars, assign

Tensors = list[tuple[str, torch.Tensor]]
HOSTS = ("127.0.0.1", "127.0.0.2")
PROMPT = (5, 17, 300)
BRING = {"session": "one", "version": 7, "ranks": 0}


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def stepped(tensors: Tensors, version: int) -> Tensors:
    """Returns tensors of which a few elements differ in each version, enough to change the tokens."""
    stepped = []
    noise = torch.Generator().manual_seed(version)
    for name, tensor in tensors:
        changed = tensor.clone().reshape(-1)
        changed[version % 64 :: 64] += torch.randn(changed[version % 64 :: 64].shape, generator=noise)
        stepped.append((name, changed.reshape(tensor.shape)))
    return stepped


async def greedy(fleet: Fleet, name: str) -> tuple[int | None, tuple[int, ...]]:
    request = GenerateRequest(PROMPT, SamplingParams(8, temperature=0.0, ignore_eos=True), request_id="one")
    generation = await fleet.engines[name].generate(request, deadline=20)
    return generation.version_spans[-1].version, generation.output_ids


def expected(folder: Path) -> tuple[int, ...]:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(PROMPT) :])


class Sidecar:
    """The sidecar command, with its replica in `folder`."""

    def __init__(self, store: Path, folder: Path, host: str, *, port: int = 0, key: str | None = None) -> None:
        command = [sys.executable, "-m", "millrace", "sidecar", "--store", str(store), "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, SIDECAR_KEY: key or ""},
        )  # fmt: skip

    def until_ready(self) -> str:
        """Waits until the sidecar is ready and returns its URL."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "brings versions from" in line, self.process.communicate(timeout=10)
        return line.split()[0]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def sidecar() -> Iterator[Callable[..., Sidecar]]:
    started: list[Sidecar] = []

    def start_one(*arguments: str | Path, port: int = 0, key: str | None = None) -> Sidecar:
        started.append(Sidecar(*arguments, port=port, key=key))  # type: ignore[arg-type] # the three that it takes
        return started[-1]

    yield start_one
    for one in started:
        one.end()


@asynccontextmanager
async def on_two_hosts(model: Path, logs: Path, versions: Path, sidecars: list[str]) -> AsyncIterator[Fleet]:
    """Like `open_fleet`, with an engine on each host."""

    async def start_one(replica: int) -> Replica:
        config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, host=HOSTS[replica])
        return await start(config, LaunchSpec(model_path=model, replica=replica, log_dir=logs))

    store = VersionStore(str(versions), model, keep=1, anchor_every=3)
    started = await asyncio.gather(*(start_one(replica) for replica in range(2)))
    transport = transport_for("delta", started, store, sidecars)
    async with Fleet.open(started, transport, store, start_one) as fleet:
        await fleet.attest(folder_checksums(model), 0, model)
        yield fleet


@pytest.mark.slow
async def test_two_hosts_and_a_sidecar_that_fails(
    tensors: Tensors, tiny_model: Path, tmp_path: Path, sidecar: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIDECAR_KEY, "the key")
    versions, folders = tmp_path / "versions", [tmp_path / host for host in HOSTS]
    started = [sidecar(versions, folder, host, key="the key") for folder, host in zip(folders, HOSTS, strict=True)]
    urls = [one.until_ready() for one in started]
    async with on_two_hosts(tiny_model, tmp_path, versions, urls) as fleet:
        one, two = fleet.engines
        seen = set()
        for version in (1, 2, 3, 4, 5):  # version 4 is an anchor
            report = await fleet.publish(stepped(tensors, version), version)
            assert not report.failed
            assert report.unstored is None
            tokens = expected(folders[1] / f"version-{version:08d}")
            assert await greedy(fleet, one) == await greedy(fleet, two) == (version, tokens)
            seen.add(tokens)
        assert len(seen) == 5
        kept = sorted(path.name for path in versions.iterdir())
        assert kept == ["index.json", "version-00000004", "version-00000005.delta"]
        assert (versions / kept[2]).stat().st_size < report.nbytes / 15

        started[1].end()
        report = await fleet.publish(stepped(tensors, 6), 6)
        assert list(report.failed) == [two]
        assert f"sidecar {urls[1]} did not bring version 6: no server listens at" in str(report.failed[two])
        assert [state.name for state in fleet.snapshot.replicas if state.routable] == [one]
        assert fleet.snapshot.get(two).usable  # the engine itself has not failed, only its sidecar
        assert (await greedy(fleet, one))[0] == 6
        port = int(urls[1].rpartition(":")[2])
        started[1] = sidecar(versions, folders[1], HOSTS[1], port=port, key="the key")
        assert started[1].until_ready() == urls[1]
        await fleet.restart(two)
        assert await greedy(fleet, one) == await greedy(fleet, two) == (6, expected(folders[1] / "version-00000006"))

        started[0].process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        report = await fleet.publish(stepped(tensors, 7), 7, deadline=6.0)
        assert time.monotonic() - begun < 6.0
        assert list(report.failed) == [one]
        assert "did not answer within" in str(report.failed[one])
        assert await greedy(fleet, two) == (7, expected(folders[1] / "version-00000007"))
        started[1].process.send_signal(signal.SIGTERM)
        assert started[1].process.wait(timeout=10) == 0
        with pytest.raises(PublishError, match="no engine took version 8"):
            await fleet.publish(stepped(tensors, 8), 8, deadline=8.0)


async def test_a_hanging_store_fails_a_publish_at_its_deadline(
    tensors: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with open_fleet(
        config, tiny_model, log_dir=tmp_path, transport="delta", folder=tmp_path / "versions"
    ) as fleet:
        (one,) = fleet.engines
        await fleet.publish(stepped(tensors, 1), 1)
        pipe = tmp_path / "versions" / ".index.json.partial"
        os.mkfifo(pipe)  # opening it to write waits for a reader
        begun = time.monotonic()
        with pytest.raises(PublishError, match="the store did not take version 2 within"):
            await fleet.publish(stepped(tensors, 2), 2, deadline=4.0)
        with pytest.raises(PublishError, match="the store did not finish the version before 3"):
            await fleet.publish(stepped(tensors, 3), 3, deadline=4.0)
        assert time.monotonic() - begun < 8.0
        assert (await greedy(fleet, one))[0] == 1
        both = os.open(pipe, os.O_RDWR)
        assert isinstance(fleet._versions.transport, DeltaTransport)
        await fleet._versions.transport._securing.ended()
        os.close(both)
        pipe.unlink()
        assert not (await fleet.publish(stepped(tensors, 4), 4)).failed
        assert (await greedy(fleet, one))[0] == 4


async def test_without_sidecars_this_host_brings_them(tensors: Tensors, tiny_model: Path, tmp_path: Path) -> None:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    url = f"memory://{uuid4()}"
    async with open_fleet(config, tiny_model, log_dir=tmp_path, transport="delta", folder=url) as fleet:
        (one,) = fleet.engines
        tokens = {}
        for version in (1, 2):
            assert not (await fleet.publish(stepped(tensors, version), version)).failed
            tokens[version] = await greedy(fleet, one)
        replica = CheckpointMirror(url, tmp_path / "replica")
        for version in (1, 2):
            assert tokens[version] == (version, expected(replica.bring(version)[0]))
        replica.close()
        await fleet.restart(one)
        assert await greedy(fleet, one) == tokens[2]


async def test_a_sidecar_of_another_store_is_found_out(
    tensors: Tensors, tiny_model: Path, tmp_path: Path, sidecar: Callable[..., Sidecar]
) -> None:
    other = VersionStore(str(tmp_path / "other"), tiny_model, keep=1)
    other.write(1, iter([stepped(tensors, 9)]))
    other.secure(1)
    url = sidecar(tmp_path / "other", tmp_path / "replica", HOSTS[0]).until_ready()
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with open_fleet(
        config, tiny_model, log_dir=tmp_path, transport="delta", folder=tmp_path / "versions", sidecars=[url]
    ) as fleet:
        with pytest.raises(PublishError, match="the version 1 in its store has other weights"):
            await fleet.publish(stepped(tensors, 1), 1)


async def test_the_command(tensors: Tensors, tiny_model: Path, tmp_path: Path, sidecar: Callable[..., Sidecar]) -> None:
    refused = sidecar(tmp_path, tmp_path / "replica", "0.0.0.0").process
    store = VersionStore(str(tmp_path / "versions"), tiny_model, keep=2)
    store.write(7, iter([stepped(tensors, 7)]))
    store.secure(7)
    running = sidecar(tmp_path / "versions", tmp_path / "replica", HOSTS[0], key="the key")
    url = running.until_ready()

    async def ask(body: object, key: str | None = "the key") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with session.post(f"{url}/bring", json=body, headers=headers) as response:
            return response.status, await response.text()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        async with session.get(f"{url}/health") as response:
            assert response.status == 200
        for key in (None, "wrong"):
            assert (await ask(BRING, key))[0] == 401
        bodies: list[object] = [{}, {"version": "7"}, {"version": -1}, {"version": 7, "folder": "/"}, []]
        for body in bodies:
            assert (await ask(body))[0] == 400
        status, text = await ask({**BRING, "version": 8})
        assert status == 500
        assert "has no version 8; it has (7,)" in text
        answers = await asyncio.gather(*(ask(BRING) for _ in range(3)))
        assert len(set(answers)) == 1
        assert str(tmp_path / "replica" / "version-00000007") in answers[0][1]
        assert stored_tensors(tmp_path / "replica" / "version-00000007")

        # This store hangs, since its index is a pipe that never gets data.
        pipe = tmp_path / "versions" / "index.json"
        pipe.unlink()
        os.mkfifo(pipe)
        hanging = asyncio.create_task(ask({**BRING, "version": 8}))
        async with session.get(f"{url}/health") as response:
            assert response.status == 200
        running.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.process.wait, 10) == 0
        with pytest.raises(aiohttp.ClientError):
            await hanging

    assert await asyncio.to_thread(refused.wait, 10) == 1
    assert refused.stderr is not None
    assert refused.stderr.read() == (
        "error: other hosts can reach 0.0.0.0: set MILLRACE_SIDECAR_KEY, here and for the trainer, or use 127.0.0.1\n"
    )


def test_each_engine_has_its_hosts_sidecar() -> None:
    engines = {"a": "http://127.0.0.2:1000", "b": "http://127.0.0.2:1001", "c": "http://localhost:1000"}
    away, here = "http://127.0.0.2:9", "http://127.0.0.1:9"
    assert assign(engines, [away, here]) == {"a": away, "b": away, "c": here}
    assert assign(engines, [away]) == {"a": away, "b": away, "c": None}
    for sidecars, words in (
        ([here], "has no sidecar on the host of a, b; start `millrace sidecar` there"),
        ([away, "http://127.0.0.2:8"], "are on one host"),
        ([away, "http://127.0.0.3:9"], "there is no engine on the host of http://127.0.0.3:9"),
        ([away, "http://nowhere.invalid:9"], "the host of http://nowhere.invalid:9 can't be resolved"),
    ):
        with pytest.raises(PublishError, match=words):
            assign(engines, sidecars)


async def test_an_engine_that_joins_or_moves_uses_the_sidecar_of_its_host() -> None:
    def target(name: str, url: str) -> PublishTarget:
        return PublishTarget(EmbeddedEngine(name, url), EngineInfo("embedded", "1", "model", None, 1, 1, frozenset()))

    sidecars = EngineSidecars(
        {"a": "first"}, {"http://127.0.0.2:9": "first", "http://127.0.0.3:9": "second", None: "own"}
    )
    places = {
        "a": "http://127.0.0.2:1",
        "b": "http://127.0.0.3:1",
        "c": "http://localhost:1",
        "d": "http://127.0.0.4:1",
    }
    lacking = await sidecars.place([target(name, url) for name, url in places.items()])
    assert [sidecars[name] for name in "abc"] == ["first", "second", "own"]
    assert list(lacking) == ["d"]
    assert "has no sidecar on its host (http://127.0.0.4:1); start `millrace sidecar` there" in str(lacking["d"])
    assert not await sidecars.place([target("a", "http://127.0.0.3:2")])  # started again on another host
    assert sidecars["a"] == "second"
    assert assign({"a": "http://127.0.0.2:1"}, ["http://127.0.0.2:9", "http://127.0.0.3:9"], spare=True) == {
        "a": "http://127.0.0.2:9"
    }


def test_sidecars_are_for_some_and_delta_needs_a_store() -> None:
    sidecars = ("http://127.0.0.2:9",)
    PublishConfig(transport="delta", folder="s3://bucket/run", sidecars=sidecars)
    with pytest.raises(ValueError, match=r"publish\.sidecars are for publish\.transport delta or ucx, and it is disk"):
        PublishConfig(transport="disk", folder="versions", sidecars=sidecars)
    with pytest.raises(ValueError, match=r"publish\.transport delta needs publish\.folder, which is not set"):
        PublishConfig(transport="delta", sidecars=sidecars)
