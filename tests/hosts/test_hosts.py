"""A fleet with engines on other hosts. One host is cut off, or dies, in the middle of a publish and of requests."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config import EmbeddedEngineConfig
from millrace.config.models import TransportName
from millrace.engines.start import ADMIN_KEY, API_KEY
from millrace.engines.stock.launching import all_healthy
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.http import HttpClient
from millrace.launch.ports import listens
from millrace.weights.sidecar.server import SIDECAR_KEY
from tests.fleet.test_fleet import expected, greedy, tensors
from tests.hosts.network import Host, network, why_no_hosts

PORT, SIDECAR_PORT = 8000, 8400
BUCKET = 64 * 1024  # bytes; the tiny model takes several buckets
DEADLINE = 20.0  # of a publish in which a host is lost
REQUESTS, TOKENS = 16, 200


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if (why := why_no_hosts()) is not None:
        pytest.skip(why)
    with network(2) as made:
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
