"""A launcher of the user's own starts the engines of a fleet, and gets its places back."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from millrace import open_fleet
from millrace.config.engines import EmbeddedEngineConfig, SGLangEngineConfig
from millrace.errors import ConfigError, LaunchError
from millrace.launch import guard
from millrace.launch.base import Launcher, Need, Place
from millrace.launch.ports import free_block
from millrace.launch.process import Server, ServerProcess
from millrace.types import GenerateRequest, SamplingParams
from tests.launch.fleets import engine_hosts

OWN = "tests.launch.test_launchers:two_places"
opened: list["TwoPlaces"] = []


class Loopback:
    """A place at an address of its own, 127.0.0.N, whose processes are marked."""

    gpus = None
    python = sys.executable

    def __init__(self, host: str, gone: set[str]) -> None:
        self.host, self.gone = host, gone

    async def free_ports(self, count: int) -> int:
        return free_block(self.host, count)

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> Server:
        env = {**env, "PLACED": self.host}
        server = await PlacedProcess.start(name, command, log_path, env=env, leftovers=leftovers)
        server.hosts, server.gone = [self.host], self.gone
        return server


class PlacedProcess(ServerProcess):
    """A server on a host. gone: the hosts on which nothing more starts."""

    gone: set[str]

    async def avoid(self, host: str, seconds: float) -> None:
        self.gone.add(host)


class TwoPlaces:
    """A launcher with two places, or with others, which it gives to one engine each."""

    def __init__(self, cluster: str | None, hosts: Sequence[str] = ("127.0.0.3", "127.0.0.2")) -> None:
        self.cluster = cluster
        self.gone: set[str] = set()
        self.free: list[Place] = [Loopback(host, self.gone) for host in hosts]
        self.needs: list[Need] = []

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence[Place]:
        free = [place for place in self.free if place.host not in self.gone]
        if nodes > len(free):
            raise LaunchError(f"{name} needs {nodes} places, and {len(free)} are free")
        self.needs.append(need)
        taken = free[-nodes:]
        self.free = [place for place in self.free if place not in taken]
        return taken

    async def release(self, places: Sequence[Place]) -> None:
        self.free += [place for place in places if place not in self.free]


@asynccontextmanager
async def two_places(cluster: str | None) -> AsyncIterator[Launcher]:
    opened.append(TwoPlaces(cluster))
    yield opened[-1]


@asynccontextmanager
async def two_on_one_host(cluster: str | None) -> AsyncIterator[Launcher]:
    yield TwoPlaces(cluster, ["127.0.0.3", "127.0.0.2", "127.0.0.2"])


def config(**settings: object) -> EmbeddedEngineConfig:
    return EmbeddedEngineConfig.model_validate({"kind": "embedded", "launch": OWN, **settings})


def children(module: str) -> list[int]:
    """The processes below this one that run the module."""
    found = []
    for pid in guard.descendants():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if command[1:3] == [b"-m", module.encode()]:
            found.append(pid)
    return found


async def test_engines_run_at_the_places_and_give_them_back(tiny_model: Path, tmp_path: Path) -> None:
    async with open_fleet(
        config(replicas=2, threads=1, cluster="here"), tiny_model, log_dir=tmp_path, restarts=1
    ) as fleet:
        launcher = opened[-1]
        assert launcher.cluster == "here"
        assert launcher.needs == [Need(gpus=0, cpus=1)] * 2
        assert not launcher.free
        hosts = {replica.engine.url.rpartition(":")[0] for replica in fleet.replicas.by_name.values()}
        assert hosts == {"http://127.0.0.2", "http://127.0.0.3"}
        request = GenerateRequest((5, 6, 7), SamplingParams(max_new_tokens=4, temperature=0.0))
        assert (await fleet.generate(request, deadline=30)).output_ids
        # A restart takes the place that the dead engine had.
        await fleet.restart("embedded-0")
        assert len(launcher.needs) == 3
        assert (await fleet.generate(request, deadline=30)).output_ids
    assert len(launcher.free) == 2


async def test_what_the_launcher_lacks_is_said_and_nothing_stays_reserved(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"^embedded-\d needs 1 places, and 0 are free$"):
        async with open_fleet(config(replicas=3), tiny_model, log_dir=tmp_path):
            pass
    assert len(opened[-1].free) == 2


async def test_an_engine_that_does_not_come_up_gives_its_place_back(tmp_path: Path, tiny_model: Path) -> None:
    wrong = SGLangEngineConfig(kind="sglang", device="cpu", python=Path(sys.executable), launch=OWN)
    with pytest.raises(LaunchError, match=r"has no module sglang; install it there, or name another interpreter$"):
        async with open_fleet(wrong, tiny_model, log_dir=tmp_path):
            pass
    assert len(opened[-1].free) == 2


async def test_a_host_without_the_engines_environment_is_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path))
    wrong = SGLangEngineConfig(kind="sglang", device="cpu", launch=OWN)
    with pytest.raises(LaunchError, match=r"is not installed in .*; run: millrace engines install sglang --version"):
        async with open_fleet(wrong, tiny_model, log_dir=tmp_path):
            pass


@pytest.mark.parametrize("name", ["tests.launch.test_launchers:nothing", "no.such.module:launcher"])
async def test_a_launcher_that_does_not_exist_is_named(name: str, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=f"^engine.launch: {name} can't be imported: "):
        async with open_fleet(config(launch=name), tiny_model, log_dir=tmp_path):
            pass


async def test_engines_elsewhere_are_not_kept_running(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="keep_running is for engines on this host"):
        async with open_fleet(config(), tiny_model, log_dir=tmp_path, keep_running=tmp_path):
            pass


async def test_a_launcher_learns_of_a_preemption_by_hand(tmp_path: Path, tiny_model: Path) -> None:
    settings = config(launch="tests.launch.test_launchers:two_on_one_host")
    async with open_fleet(settings, tiny_model, log_dir=tmp_path) as fleet:
        assert engine_hosts(fleet) == ["127.0.0.2"]
        await fleet.preempt("embedded-0")
        async with asyncio.timeout(120), fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(lambda: bool(fleet.snapshot.routable))
        assert engine_hosts(fleet) == ["127.0.0.3"]  # although there is room on the other host


@pytest.mark.parametrize("fault", ["error", "silence"])
async def test_an_engine_is_preempted_although_its_launcher_does_not_learn_of_it(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    async def avoid(self: ServerProcess, host: str, seconds: float) -> None:
        if fault == "silence":
            await asyncio.sleep(3600)
        raise LaunchError("the cluster is busy")

    monkeypatch.setattr(PlacedProcess, "avoid", avoid)
    async with open_fleet(config(replicas=1), tiny_model, log_dir=tmp_path) as fleet:
        await fleet.preempt("embedded-0")
        async with asyncio.timeout(120), fleet.replicas.changed:
            await fleet.replicas.changed.wait_for(lambda: bool(fleet.snapshot.routable))
    why = {"error": "the cluster is busy", "silence": "its launcher did not answer within 2 s"}[fault]
    assert f"the replacement of embedded-0 may start on the host that goes away: {why}" in caplog.text


async def test_the_launcher_of_the_docs_pins_each_engine_to_a_core(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        (Path(__file__).parents[2] / "docs/clusters.md")
        .read_text()
        .partition("```python\n# pinned.py")[2]
        .partition("```")[0]
    )
    (tmp_path / "pinned.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    others = children("millrace.engines.embedded")  # those of other tests, which are kept
    async with open_fleet(config(replicas=2, launch="pinned:cores"), tiny_model, log_dir=tmp_path):
        started = set(children("millrace.engines.embedded")).difference(others)
        cores = [os.sched_getaffinity(pid) for pid in started]
    assert sorted(cores, key=min) == [{0}, {1}]


@pytest.mark.parametrize(("setting", "value"), [("ports", [1]), ("host", "0.0.0.0"), ("urls", ["http://a:1"])])
def test_settings_of_this_host_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{setting} is for launch: local, and launch is {OWN}; leave {setting}"):
        config(**{setting: value})


def test_a_cluster_needs_a_launcher_that_has_one() -> None:
    with pytest.raises(ValidationError, match="cluster is for a launcher that has one"):
        config(launch="local", cluster="10.0.0.1:6379")


def test_the_id_of_a_job_may_be_a_number() -> None:
    assert config(launch="slurm", cluster=4711).cluster == "4711"


@pytest.mark.slow
async def test_a_stock_engine_runs_at_a_place(tmp_path: Path, tiny_model: Path) -> None:
    """It finds its interpreter and Millrace's extension where it runs."""
    settings = {"kind": "sglang", "device": "cpu", "launch": OWN, "start_timeout": 240.0}
    async with open_fleet(settings, tiny_model, log_dir=tmp_path) as fleet:
        (replica,) = fleet.replicas.by_name.values()
        assert replica.engine.url.startswith("http://127.0.0.2:")
        request = GenerateRequest((5, 6, 7), SamplingParams(max_new_tokens=4, temperature=0.0))
        assert len((await fleet.generate(request, deadline=60)).output_ids) == 4
    assert len(opened[-1].free) == 2
