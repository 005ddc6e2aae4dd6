"""Nodes of a real Slurm that go away, and the engines there: `make test-slurm`."""

import asyncio
from pathlib import Path

import pytest

from millrace import open_fleet
from millrace.errors import LaunchError
from millrace.launch.base import Need
from millrace.launch.slurm.driver import LOOK_SECONDS
from millrace.launch.slurm.launcher import open_slurm
from tests.launch.fleets import (
    by_hand,
    require_avoids_a_host,
    require_leaves_as_a_whole,
    require_leaves_its_host_in_time,
    require_uses_a_host_again,
)
from tests.launch.processes import variables_of
from tests.launch.slurm.cluster import NODES, ONE_NODE, THREE_NODES, TWO_NODES, SlurmCluster, config, why_no_slurm

pytestmark = pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))


@pytest.mark.parametrize("notice", ["drain", "signal"])
async def test_an_engine_leaves_a_node_that_goes_away_and_another_one_starts_elsewhere(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path, notice: str
) -> None:
    """Slurm itself makes steps on a node that drains."""
    with slurm.job(*TWO_NODES) as job:

        def announce(host: str) -> None:
            if notice == "drain":
                slurm.drain(host)
                return
            (name,) = (name for name, its in NODES.items() if its == host)
            shown = slurm.run("squeue", "--steps", "--noheader", "--format=%i %N", f"--jobs={job}").splitlines()
            (step,) = (line.split()[0] for line in shown if line.split()[1] == name)
            slurm.signal(step)

        try:
            settings = config(job, replicas=2, faults=True)
            async with open_fleet(settings, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
                await require_leaves_its_host_in_time(fleet, tiny_model, announce, 30.0)
        finally:
            slurm.resume()


async def test_after_a_preemption_by_hand_the_replacement_starts_on_another_node(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*TWO_NODES) as job:
        settings = config(job, replicas=2, faults=True)
        async with open_fleet(settings, tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
            await require_leaves_its_host_in_time(fleet, tiny_model, by_hand(fleet, 30.0), 30.0)


async def test_nothing_starts_on_a_node_that_goes_away(slurm: SlurmCluster, tmp_path: Path) -> None:
    with slurm.job(*TWO_NODES) as job:
        async with open_slurm(job) as launcher:
            await require_avoids_a_host(launcher, tmp_path / "log")


@pytest.mark.slow
async def test_a_node_that_has_not_gone_away_is_used_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    with slurm.job(*TWO_NODES) as job:
        async with open_slurm(job) as launcher:
            await require_uses_a_host_again(launcher, tmp_path / "log")


async def test_an_engine_stays_on_a_node_that_drains_if_the_job_has_no_other(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """And no other one starts there."""
    with slurm.job(*ONE_NODE) as job:
        async with open_slurm(job) as launcher:
            (place,) = await launcher.reserve("stays", Need(0, 1), 1, deadline=30)
            code = [place.python, "-c", "import time; time.sleep(600)"]
            server = await place.start("stays", code, tmp_path / "log", env={}, leftovers=())
            slurm.drain(place.host)
            try:
                says = r"did not get it within 3 s; .*; this fleet's engines have 0 GPUs and 1 CPU of n1; n1 goes away$"
                with pytest.raises(LaunchError, match=says):
                    await launcher.reserve("another", Need(0, 1), 1, deadline=3)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1.5 * LOOK_SECONDS):
                        await server.notice()
                assert server.running
            finally:
                slurm.resume()
            await launcher.release(await launcher.reserve("another", Need(0, 1), 1, deadline=30))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "notice"), [("sglang", "drain"), ("vllm", "drain"), ("sglang", "by hand")])
async def test_an_engine_over_two_nodes_leaves_as_a_whole_if_one_goes_away(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path, kind: str, notice: str
) -> None:
    def host_of(pid: int) -> str:
        return NODES[variables_of(pid)["SLURMD_NODENAME"]]

    with slurm.job(*THREE_NODES) as job:
        hosts = [NODES[name] for name in ("n1", "n2", "n3")]
        try:
            announce = slurm.drain if notice == "drain" else None
            await require_leaves_as_a_whole(config(job, kind=kind), hosts, host_of, announce, tiny_model, tmp_path)
        finally:
            slurm.resume()
        assert not slurm.steps(job)
