"""Engines on a real Ray cluster: three Ray nodes of this machine, each with an address of its own.

They run where Ray is installed: `make test-ray`.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from millrace import open_fleet
from millrace.errors import ConfigError, LaunchError, NoEngineError
from millrace.launch.base import Need
from millrace.launch.driven import DrivenLauncher, DrivenPlace, DrivenServer
from millrace.launch.ray_cluster.launcher import open_ray
from tests.launch.fleets import (
    REQUEST,
    by_hand,
    engine_hosts,
    owner,
    require_avoids_a_host,
    require_gives_back_what_comes_too_late,
    require_leaves_as_a_whole,
    require_leaves_its_host_in_time,
    require_runs_over_two_hosts,
    require_takes_weights,
    require_uses_a_host_again,
    served,
)
from tests.launch.processes import alive, processes_with, variables_of

cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.filterwarnings("default")
HOSTS = ("127.0.0.2", "127.0.0.3")


class RayCluster:
    """A head without CPUs, and a node with two CPUs and two GPUs (by name only) at each of HOSTS."""

    def __init__(self) -> None:
        self.cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address: str = self.cluster.address
        self.nodes = [self.add(host) for host in HOSTS]

    def add(self, host: str, **resources: int) -> Any:
        return self.cluster.add_node(node_ip_address=host, **{"num_cpus": 2, "num_gpus": 2, **resources})

    def drain(self, host: str, seconds: int) -> None:
        """Tell Ray that the node of a host goes away in so many seconds."""
        (node,) = (node for node in self.nodes if node.node_ip_address == host)
        words = ["drain-node", "--address", self.address, "--node-id", node.node_id, "--reason-message", "spot"]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words, *reason], check=True, timeout=30)

    def config(self, **settings: object) -> dict[str, object]:
        return {"kind": "embedded", "launch": "ray", "cluster": self.address, "threads": 1, **settings}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    made = RayCluster()
    yield made
    made.cluster.shutdown()


@asynccontextmanager
async def joined(cluster: RayCluster) -> AsyncIterator[DrivenLauncher]:
    async with open_ray(cluster.address) as launcher:
        yield launcher


async def until(condition: Callable[[], bool], what: str, deadline: float = 60.0) -> None:
    try:
        async with asyncio.timeout(deadline):
            while not condition():
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"{what} within {deadline:.0f} s")


async def shows(log: Path, text: str) -> None:
    await until(lambda: log.exists() and text in log.read_text(), f"{log} shows {text!r}")


async def test_replicas_are_spread_serve_and_take_weights_across_hosts(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    async with open_fleet(cluster.config(replicas=2), tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
        assert engine_hosts(fleet) == list(HOSTS)
        await require_takes_weights(fleet, tiny_model)
    assert not processes_with(served(tiny_model)), "the engines run on"


async def test_an_engine_whose_server_or_actor_dies_is_restarted(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    async with open_fleet(cluster.config(), tiny_model, log_dir=tmp_path, restarts=3) as fleet:
        for victim in (served(tiny_model), "ray::NodeActor"):
            old = fleet.replicas.by_name["embedded-0"]
            (pid,) = processes_with(victim, without="guard.py")
            os.kill(pid, signal.SIGKILL)
            await until(lambda old=old: fleet.replicas.by_name["embedded-0"] is not old, f"{victim} is restarted", 120)  # type: ignore[misc]
            assert (await fleet.generate(REQUEST, deadline=60)).output_ids
            assert not alive(pid)
            await until(lambda: len(processes_with(served(tiny_model), without="guard.py")) == 1, "the old one ends")
    assert not processes_with(served(tiny_model))


async def test_why_a_server_ended_comes_back_with_the_end_of_its_log(cluster: RayCluster, tmp_path: Path) -> None:
    async with joined(cluster) as launcher:
        (place,) = await launcher.reserve("broken", Need(0, 1), 1, deadline=30)
        code = "print('no such model'); raise SystemExit(5)"
        server = await place.start("broken", [place.python, "-c", code], tmp_path / "broken.log", env={}, leftovers=())
        async with asyncio.timeout(30):
            await server.wait()
        assert not server.running
        assert server.describe_end() == f"broken ended with status 5 (on {place.host})"
        assert server.log_tail().endswith("  no such model")
        await server.end()
        await launcher.release([place])


async def test_ray_assigns_the_gpus_and_packs_the_nodes_of_an_engine(cluster: RayCluster, tmp_path: Path) -> None:
    show = "import os; print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'])"
    async with joined(cluster) as launcher:
        places = [*await launcher.reserve("two", Need(1, 1), 2, deadline=30)]
        assert places[0].host == places[1].host
        assert sorted(place.gpus or "" for place in places) == ["0", "1"]
        others = await launcher.reserve("other", Need(2, 1), 1, deadline=30)
        assert others[0].host != places[0].host
        assert others[0].gpus == "0,1"
        await others[0].start("other", [sys.executable, "-c", show], tmp_path / "log", env={}, leftovers=())
        await shows(tmp_path / "log", "GPUs 0,1")
        await launcher.release(places)
        await launcher.release(places)  # as when an engine is ended twice
        again = await launcher.reserve("again", Need(2, 1), 1, deadline=30)
        assert again[0].host == places[0].host


async def test_an_engine_leaves_a_node_that_drains_and_another_one_starts_elsewhere(
    tiny_model: Path, tmp_path: Path
) -> None:
    own = RayCluster()
    try:
        settings = own.config(replicas=2, faults=True)
        async with open_fleet(settings, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
            await require_leaves_its_host_in_time(fleet, tiny_model, lambda host: own.drain(host, 40), 30.0)
    finally:
        own.cluster.shutdown()


async def test_after_a_preemption_by_hand_the_replacement_starts_on_another_host(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    settings = cluster.config(replicas=2, faults=True)
    async with open_fleet(settings, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
        await require_leaves_its_host_in_time(fleet, tiny_model, by_hand(fleet, 30.0), 30.0)


async def test_nothing_starts_on_a_host_that_goes_away(cluster: RayCluster, tmp_path: Path) -> None:
    async with joined(cluster) as launcher:
        await require_avoids_a_host(launcher, tmp_path / "log")


@pytest.mark.slow
async def test_a_host_that_has_not_gone_away_is_used_again(cluster: RayCluster, tmp_path: Path) -> None:
    async with joined(cluster) as launcher:
        await require_uses_a_host_again(launcher, tmp_path / "log")


async def started(launcher: DrivenLauncher, log: Path) -> tuple[DrivenPlace, DrivenServer]:
    """Starts a process that runs on."""
    (place,) = await launcher.reserve("stays", Need(0, 1), 1, deadline=30)
    code = [place.python, "-c", "import time; time.sleep(600)"]
    return place, await place.start("stays", code, log, env={}, leftovers=())


async def test_a_head_that_does_not_answer_is_one_line_and_its_notices_come_later(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = RayCluster()
    try:
        async with joined(own) as launcher:
            place, server = await started(launcher, tmp_path / "log")
            head = own.cluster.head_node.all_processes["gcs_server"][0].process
            head.send_signal(signal.SIGSTOP)
            says = f"the Ray cluster at {own.address} does not say which nodes drain, and is asked again: RPC error"
            try:
                await until(lambda: says in caplog.text, "the log says so")
            finally:
                head.send_signal(signal.SIGCONT)
            own.drain(place.host, 300)
            async with asyncio.timeout(30):
                await server.notice()
            assert server.running
            assert caplog.text.count(says) == 1
    finally:
        own.cluster.shutdown()


async def test_ray_places_nothing_on_a_node_that_drains(tmp_path: Path) -> None:
    """Although it has room. A process that runs on keeps it in the cluster."""
    own = RayCluster()
    try:
        async with joined(own) as launcher:
            place, server = await started(launcher, tmp_path / "log")
            own.drain(place.host, 300)
            async with asyncio.timeout(30):
                assert 290 < await server.notice() <= 300
            others = [(await launcher.reserve(f"other{i}", Need(0, 1), 1, deadline=30))[0] for i in range(2)]
            assert place.host not in {other.host for other in others}
            with pytest.raises(LaunchError, match="and did not get it within 3 s"):
                await launcher.reserve("third", Need(0, 1), 1, deadline=3)
            assert server.running
    finally:
        own.cluster.shutdown()


async def test_a_place_that_comes_too_late_is_given_back(cluster: RayCluster) -> None:
    async with joined(cluster) as launcher:
        await require_gives_back_what_comes_too_late(launcher)


async def test_a_lack_of_resources_says_what_was_asked_and_what_there_is(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    """Also to the second of two owners, whose clusters are the same."""
    wanted = r"^embedded-0 asks Ray for 1 x \(0 GPUs and 2 CPUs\), and did not get it within 3 s; the Ray cluster at "
    async with open_fleet(cluster.config(replicas=2), tiny_model, log_dir=tmp_path) as fleet:
        with pytest.raises(LaunchError, match=wanted + r".* 3 hosts with 4 GPUs, 4 of them free and 4 CPUs, 2 of them"):
            async with open_fleet(cluster.config(threads=2, start_timeout=3.0), tiny_model, log_dir=tmp_path / "b"):
                pass
        assert (await fleet.generate(REQUEST, deadline=60)).output_ids
    async with joined(cluster) as launcher:
        with pytest.raises(LaunchError, match=r"^big asks Ray for 2 x \(3 GPUs and 1 CPU\), and did not get it within"):
            await launcher.reserve("big", Need(3, 1), 2, deadline=2)


async def test_a_host_without_the_engines_environment_is_named(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    home = {"MILLRACE_HOME": str(tmp_path / "home")}
    settings = cluster.config(kind="sglang", device="cpu", env=home)
    says = r"sglang 0.5.23 \(cpu\) is not installed in .*home.*; run: millrace engines install sglang"
    with pytest.raises(LaunchError, match=says):
        async with open_fleet(settings, tiny_model, log_dir=tmp_path):
            pass


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        ("127.0.0.1:1", LaunchError, "^no Ray cluster answers at 127.0.0.1:1; start it with: ray start --head"),
        ("ray://127.0.0.1:10001", ConfigError, "is not a host:port of Ray's head node"),
        ("nonsense", ConfigError, "is not a host:port of Ray's head node"),
    ],
)
async def test_an_address_without_a_cluster_is_one_line(address: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        async with open_ray(address):
            pass


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
async def test_nothing_is_left_when_the_owner_ends(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    async with owner("ray", cluster.address, tiny_model, tmp_path) as process:
        assert len(processes_with(served(tiny_model), without="guard.py")) == 2
        process.send_signal(signum)
        await until(lambda: process.poll() is not None, "the owner ends")
        for left in (served(tiny_model), "ray::NodeActor", "ray_cluster.driver"):
            await until(lambda left=left: not processes_with(left), f"no {left} is left")  # type: ignore[misc]
    async with joined(cluster) as launcher:  # and Ray has everything back
        await launcher.release(await launcher.reserve("all", Need(2, 2), 2, deadline=30))


@pytest.mark.slow
async def test_a_stock_engine_runs_on_the_cluster(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    settings = cluster.config(kind="sglang", device="cpu", start_timeout=240.0)
    async with open_fleet(settings, tiny_model, log_dir=tmp_path) as fleet:
        assert engine_hosts(fleet)[0] in HOSTS
        assert len((await fleet.generate(REQUEST, deadline=60)).output_ids) == 4
    assert not processes_with(str(tiny_model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sglang", "vllm"])
async def test_an_engine_over_two_nodes_runs_on_two_hosts_and_restarts_as_a_whole(
    cluster: RayCluster, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    await require_runs_over_two_hosts(cluster.config(kind=kind), HOSTS, tiny_model, tmp_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "notice"), [("sglang", "drain"), ("vllm", "drain"), ("sglang", "by hand")])
async def test_an_engine_over_two_nodes_leaves_as_a_whole_if_one_goes_away(
    tiny_model: Path, tmp_path: Path, kind: str, notice: str
) -> None:
    def host_of(pid: int) -> str:
        raylet = Path(f"/proc/{variables_of(pid)['RAY_RAYLET_PID']}/cmdline").read_bytes().decode()
        return raylet.partition("--node_ip_address=")[2].partition("\0")[0]

    own = RayCluster()
    try:
        own.nodes.append(own.add("127.0.0.4"))
        hosts = [*HOSTS, "127.0.0.4"]
        settings = own.config(kind=kind)
        announce = (lambda host: own.drain(host, 120)) if notice == "drain" else None
        await require_leaves_as_a_whole(settings, hosts, host_of, announce, tiny_model, tmp_path)
    finally:
        own.cluster.shutdown()


async def test_a_cluster_that_goes_away_is_one_line_and_ends_the_engines(tiny_model: Path, tmp_path: Path) -> None:
    own = RayCluster()
    try:
        async with open_fleet(own.config(), tiny_model, log_dir=tmp_path) as fleet:
            await asyncio.to_thread(own.cluster.shutdown)
            await until(lambda: not fleet.replicas.snapshot.usable, "the engine is dead", 120)
            (state,) = fleet.replicas.snapshot.replicas
            assert "embedded-0 ended with its Ray actor" in str(state) or "is gone" in str(state)
            with pytest.raises(NoEngineError):
                await fleet.generate(REQUEST, deadline=60)
            await until(lambda: not processes_with(served(tiny_model)), "the server ends")
    finally:
        own.cluster.shutdown()
