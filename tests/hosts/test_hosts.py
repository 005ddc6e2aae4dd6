"""A fleet with engines on other hosts. One host is cut off, or dies, in the middle of a publish and of requests."""

import asyncio
import copy
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config import EmbeddedEngineConfig
from millrace.config.engines import ReplicaRange
from millrace.config.models import TransportName
from millrace.engines.start import ADMIN_KEY, API_KEY
from millrace.engines.stock.launching import all_healthy
from millrace.errors import LaunchError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.http import HttpClient
from millrace.launch.base import Need, Place
from millrace.launch.ports import listens
from millrace.launch.process import Server, ServerProcess
from millrace.weights.sidecar.server import SIDECAR_KEY
from tests.fleet.test_fleet import expected, greedy, tensors
from tests.hosts.network import Host, hosts_or_skip

PORT, SIDECAR_PORT = 8000, 8400
BUCKET = 64 * 1024  # bytes; the tiny model takes several buckets
DEADLINE = 20.0  # of a publish in which a host is lost
REQUESTS, TOKENS = 16, 200


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with hosts_or_skip(2) as made:
        yield made


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "data")
    monkeypatch.setenv(ADMIN_KEY, "control")
    monkeypatch.setenv(SIDECAR_KEY, "sidecars")


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


async def start_engine(host: Host, model: Path, logs: Path) -> str:
    """Start an engine on a host. Return its URL."""
    keys = {"MILLRACE_API_KEY": "data", "MILLRACE_ADMIN_API_KEY": "control", "OMP_NUM_THREADS": "1"}
    place = ["--host", host.address, "--port", str(PORT), "--weight-version", "0"]
    log = logs / f"{host.address}.log"
    host.python("millrace.engines.embedded", "--model", str(model), *place, log=log, environment=keys)
    url = f"http://{host.address}:{PORT}"
    client = HttpClient(host.address, url)
    async with asyncio.timeout(120):
        while not await all_healthy([client]):
            await asyncio.sleep(0.05)
    await client.close()
    return url


async def start_sidecar(host: Host, logs: Path) -> str:
    """Start a sidecar on a host. Return its URL."""
    place = ["--host", host.address, "--port", str(SIDECAR_PORT)]
    host.python("millrace", "sidecar", *place, log=logs / f"{host.address}-sidecar.log")
    async with asyncio.timeout(60):
        while not await listens(host.address, SIDECAR_PORT):
            await asyncio.sleep(0.05)
    return f"http://{host.address}:{SIDECAR_PORT}"


def cutting(pairs: Sequence[tuple[str, torch.Tensor]], host: Host) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors, once. The host is cut off when half of them have been taken."""
    for number, pair in enumerate(pairs):
        if number == len(pairs) // 2:
            host.cut()
        yield pair


async def until_serving(fleet: Fleet, count: int) -> None:
    async with asyncio.timeout(120):
        while sum(state.routable for state in fleet.snapshot.replicas) != count:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("transport", ["gloo", pytest.param("ucx", marks=pytest.mark.slow)])
async def test_a_host_is_cut_off_in_the_middle_of_a_publish_and_comes_back(
    transport: TransportName, hosts: list[Host], tiny_model: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    """The other host has the version, no request is lost or answered twice, and the first one catches up."""
    urls = await asyncio.gather(*(start_engine(host, tiny_model, tmp_path) for host in hosts))
    sidecars = [await start_sidecar(host, tmp_path) for host in hosts] if transport == "ucx" else []
    config = EmbeddedEngineConfig(kind="embedded", urls=tuple(urls), replicas=2)
    here, away = "embedded-0", "embedded-1"
    async with open_fleet(
        config, tiny_model, log_dir=tmp_path, transport=transport, sidecars=sidecars, restarts=8
    ) as fleet:
        await fleet.publish(tensors(model, 1.0), bucket_bytes=BUCKET)
        requests = [greedy(f"r{number}", TOKENS) for number in range(REQUESTS)]
        asked = asyncio.create_task(fleet.generate_all(requests, deadline=300, retries=3))
        await until_busy(fleet)
        report = await fleet.publish(cutting(tensors(model, 1.5), hosts[1]), bucket_bytes=BUCKET, deadline=DEADLINE)
        assert {one.engine: one.error is None for one in report.engines} == {here: True, away: False}
        assert not fleet.snapshot.get(away).routable
        made = await asyncio.wait_for(asked, 300)
        assert [len(one.output_ids) for one in made] == [TOKENS] * REQUESTS
        assert {span.version for one in made for span in one.version_spans} <= {1, 2}
        after = await fleet.generate(greedy("after"), deadline=60)
        assert after.output_ids == expected(scaled(model, 1.5))
        hosts[1].connect()
        await fleet.publish(lambda: tensors(model, 0.8), bucket_bytes=BUCKET)
        await until_serving(fleet, 2)
        assert {state.version for state in fleet.snapshot.replicas} == {3}
        for engine in fleet.engines.values():
            answer = await engine.generate(greedy(f"at-{engine.name}"), deadline=60)
            assert answer.output_ids == expected(scaled(model, 0.8))


@pytest.mark.slow
async def test_a_spot_host_is_lost_with_all_its_engines_and_no_sample_is_lost_or_doubled(
    hosts: list[Host], tiny_model: Path, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fleet goes on with the other host. When that has room, engines start there, and get the weights there."""
    caplog.set_level(logging.INFO)
    Hosts.here = Hosts(hosts, room=2)
    config = EmbeddedEngineConfig(
        kind="embedded", threads=1, launch="tests.hosts.test_hosts:open_hosts", replicas=ReplicaRange(min=4, max=4)
    )
    async with open_fleet(config, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
        await fleet.publish(iter(tensors(model, 1.5)), bucket_bytes=BUCKET)
        requests = [greedy(f"r{number}", TOKENS) for number in range(REQUESTS)]
        asked = asyncio.create_task(fleet.generate_all(requests, deadline=300, retries=3))
        await until_busy(fleet)
        hosts[1].end()
        made = await asyncio.wait_for(asked, 300)
        assert sorted(one.request_id for one in made) == sorted(one.request_id for one in requests)
        assert {one.output_ids for one in made} == {expected(scaled(model, 1.5), TOKENS)}
        assert {span.version for one in made for span in one.version_spans} == {1}
        async with asyncio.timeout(60):
            while not fleet.event_log.metrics.scalings["up", False] > 2:
                await asyncio.sleep(0.05)
        assert caplog.text.count("no host has room for another engine") == 1
        assert (fleet.size.wanted, fleet.size.serving) == (4, 2)
        Hosts.here.room = 3
        await until_serving(fleet, 3)
        assert "got version 1 from embedded-" in caplog.text
        for engine in fleet.engines.values():
            assert f"http://{hosts[0].address}:" in engine.url
            assert (await engine.generate(greedy("at"), deadline=60)).output_ids == expected(scaled(model, 1.5))


class HostPlace:
    """A place on a host."""

    ports = itertools.count(PORT + 1)
    gpus, python = None, sys.executable

    def __init__(self, host: Host) -> None:
        self._host, self.host = host, host.address

    async def free_ports(self, count: int) -> int:
        assert count == 1
        return next(self.ports)

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> Server:
        return await ServerProcess.start(name, self._host.inside(command), log_path, env=env, leftovers=leftovers)


class Hosts:
    """A launcher that starts engines on hosts, at most `room` on each."""

    here: ClassVar["Hosts"]

    def __init__(self, hosts: Sequence[Host], room: int) -> None:
        self.hosts, self.room = hosts, room
        self._taken: list[HostPlace] = []

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence[Place]:
        taken = {host: sum(place.host == host.address for place in self._taken) for host in self.hosts if host.alive}
        host = min(taken, key=taken.__getitem__)
        if taken[host] >= self.room:
            raise LaunchError("no host has room for another engine")
        self._taken.append(HostPlace(host))
        return self._taken[-1:]

    async def release(self, places: Sequence[Place]) -> None:
        self._taken = [place for place in self._taken if place not in places]


@asynccontextmanager
async def open_hosts(cluster: str | None) -> AsyncIterator[Hosts]:
    yield Hosts.here


async def until_busy(fleet: Fleet) -> None:
    """Wait until each engine generates."""
    async with asyncio.timeout(60):
        for engine in fleet.engines.values():
            while not (await engine.loads()).running_requests:
                await asyncio.sleep(0.005)


def scaled(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    other: PreTrainedModel = copy.deepcopy(model)
    other.load_state_dict(dict(tensors(model, scale)), strict=False)
    return other
