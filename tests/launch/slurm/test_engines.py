"""Engines in jobs of a real Slurm, whose four nodes are on this machine.

They run where Slurm is installed: `make test-slurm`.
"""

import asyncio
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from millrace import open_fleet
from millrace.errors import ConfigError, LaunchError
from millrace.launch.base import Need
from millrace.launch.slurm.agent import SILENT_SECONDS
from millrace.launch.slurm.job import read_job
from millrace.launch.slurm.launcher import open_slurm
from tests.launch.fleets import (
    REQUEST,
    engine_hosts,
    owner,
    require_gives_back_what_comes_too_late,
    require_runs_over_two_hosts,
    require_takes_weights,
    served,
)
from tests.launch.processes import alive, processes_with, variables_of
from tests.launch.slurm.cluster import NODES, ONE_NODE, TWO_NODES, SlurmCluster, config, until, why_no_slurm

pytestmark = pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))
AGENT = "-m millrace.launch.slurm.agent"  # what the command line of a step's agent has, and that of its srun


async def eventually(condition: object, what: str, deadline: float = 60.0) -> None:
    await asyncio.to_thread(until, condition, what, deadline)  # type: ignore[arg-type]


async def test_replicas_are_spread_serve_and_take_weights(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*TWO_NODES) as job:
        async with open_fleet(config(job, replicas=2), tiny_model, log_dir=tmp_path, transport="gloo") as fleet:
            assert engine_hosts(fleet) == [NODES["n1"], NODES["n2"]]
            assert len(slurm.steps(job)) == 2
            await require_takes_weights(fleet, tiny_model)
        assert not slurm.steps(job)
        assert not processes_with(served(tiny_model)), "the engines run on"


async def test_an_engine_whose_step_or_server_is_killed_is_restarted(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*ONE_NODE) as job:
        async with open_fleet(config(job), tiny_model, log_dir=tmp_path, restarts=3) as fleet:
            for victim in ("step", "server"):
                old = fleet.replicas.by_name["embedded-0"]
                (pid,) = processes_with(served(tiny_model), without="guard.py")
                (step,) = slurm.steps(job)
                if victim == "step":
                    slurm.run("scancel", step)
                else:
                    os.kill(pid, signal.SIGKILL)
                await eventually(
                    lambda old=old: fleet.replicas.by_name["embedded-0"] is not old, f"the {victim} is replaced", 120
                )
                assert (await fleet.generate(REQUEST, deadline=60)).output_ids
                assert not alive(pid)
                assert slurm.steps(job) != [step]
        assert not processes_with(served(tiny_model))


async def test_a_cancelled_step_says_so(slurm: SlurmCluster, tmp_path: Path) -> None:
    with slurm.job(*ONE_NODE) as job:
        async with open_slurm(job) as launcher:
            (place,) = await launcher.reserve("sleeper", Need(0, 1), 1, deadline=30)
            code = "import time; print('it sleeps', flush=True); time.sleep(600)"
            command = [place.python, "-c", code]
            server = await place.start("sleeper", command, tmp_path / "log", env={}, leftovers=())
            await eventually(lambda: "it sleeps" in server.log_tail(), "the log's end comes back")
            (step,) = slurm.steps(job)
            slurm.run("scancel", step)
            async with asyncio.timeout(30):
                await server.wait()
            assert re.search(rf"sleeper ended with its Slurm step {step}: .*CANCELLED", server.describe_end())
            assert server.log_tail().endswith("  it sleeps")
            await launcher.release([place])


async def test_why_a_server_ended_comes_back_with_the_end_of_its_log(slurm: SlurmCluster, tmp_path: Path) -> None:
    with slurm.job(*ONE_NODE) as job:
        async with open_slurm(job) as launcher:
            (place,) = await launcher.reserve("broken", Need(0, 1), 1, deadline=30)
            code = "print('no such model'); raise SystemExit(5)"
            server = await place.start(
                "broken", [place.python, "-c", code], tmp_path / "broken.log", env={}, leftovers=()
            )
            async with asyncio.timeout(30):
                await server.wait()
            assert server.describe_end() == f"broken ended with status 5 (on {place.host})"
            assert server.log_tail().endswith("  no such model")
            await server.end()
            await launcher.release([place])
        assert not slurm.steps(job)


async def test_slurm_assigns_the_gpus_and_packs_the_nodes_of_an_engine(slurm: SlurmCluster, tmp_path: Path) -> None:
    show = "import os; print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'])"
    with slurm.job(*TWO_NODES) as job:
        async with open_slurm(job) as launcher:
            places = [*await launcher.reserve("two", Need(1, 1), 2, deadline=30)]
            assert places[0].host == places[1].host
            assert sorted(place.gpus or "" for place in places) == ["0", "1"]
            others = await launcher.reserve("other", Need(2, 1), 1, deadline=30)
            assert others[0].host != places[0].host
            assert others[0].gpus == "0,1"
            await others[0].start("other", [sys.executable, "-c", show], tmp_path / "log", env={}, leftovers=())
            await eventually(lambda: "GPUs 0,1" in (tmp_path / "log").read_text(), "the server sees its GPUs")
            await launcher.release(places)
            await launcher.release(places)  # as when an engine is ended twice
            again = await launcher.reserve("again", Need(2, 1), 1, deadline=30)
            assert again[0].host == places[0].host


async def test_a_place_that_comes_too_late_is_given_back(slurm: SlurmCluster) -> None:
    with slurm.job(*TWO_NODES) as job:
        async with open_slurm(job) as launcher:
            await require_gives_back_what_comes_too_late(launcher)


async def test_a_lack_of_room_says_what_was_asked_and_what_the_job_has(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    """Also to the second of two owners in one job, since Slurm counts for both."""
    asked = r"^embedded-0 asks Slurm for 1 x \(0 GPUs and 2 CPUs\), and did not get it within 3 s; Slurm job "
    has = r"\d+ has n1 with 2 GPUs and 2 CPUs; this fleet's engines have nothing; Slurm says of n1: .* busy$"
    with slurm.job(*ONE_NODE) as job:
        async with open_fleet(config(job), tiny_model, log_dir=tmp_path) as fleet:
            with pytest.raises(LaunchError, match=asked + has):
                async with open_fleet(
                    config(job, threads=2, start_timeout=3.0), tiny_model, log_dir=tmp_path / "second"
                ):
                    pass
            assert (await fleet.generate(REQUEST, deadline=60)).output_ids
        async with open_slurm(job) as launcher:
            (place,) = await launcher.reserve("all", Need(0, 2), 1, deadline=30)
            with pytest.raises(LaunchError, match=r"this fleet's engines have 0 GPUs and 2 CPUs of n1$"):
                await launcher.reserve("more", Need(0, 1), 1, deadline=1)
            await launcher.release([place])
            with pytest.raises(LaunchError, match=r"^big asks Slurm for 2 x \(3 GPUs and 1 CPU\), and the job has too"):
                await launcher.reserve("big", Need(3, 1), 2, deadline=600)


async def test_a_node_without_millrace_is_named(slurm: SlurmCluster) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can hide a folder from a node")
    with slurm.job("--partition=bare", *ONE_NODE) as job:
        async with open_slurm(job) as launcher:
            says = r"^engine: its step on bare ended at once: .*; Millrace must be installed in .* on all nodes"
            with pytest.raises(LaunchError, match=says):
                await launcher.reserve("engine", Need(0, 1), 1, deadline=30)
            assert not slurm.steps(job)


async def test_a_node_without_the_engines_environment_is_named(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*ONE_NODE) as job:
        settings = config(job, kind="sglang", device="cpu", env={"MILLRACE_HOME": str(tmp_path / "home")})
        says = r"sglang 0.5.23 \(cpu\) is not installed in .*home.*; run: millrace engines install sglang"
        with pytest.raises(LaunchError, match=says):
            async with open_fleet(settings, tiny_model, log_dir=tmp_path):
                pass


async def test_a_job_that_is_not_there_or_not_named_is_one_line(
    slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with slurm.job(*ONE_NODE) as job:
        pass
    for number, error, says in (
        (None, ConfigError, r"^engine.launch: slurm needs a job: run this in one \(sbatch, salloc\), or set"),
        ("n1:6379", ConfigError, "^engine.cluster: 'n1:6379' is not the id of a Slurm job, such as 4711$"),
        ("999999", LaunchError, "^`scontrol .* show job 999999` failed: .*Invalid job id"),
        (job, LaunchError, rf"^Slurm job {job} is not running: (CANCELLED|COMPLETING)$"),
    ):
        with pytest.raises(error, match=says):
            async with open_slurm(number):
                pass


async def test_keys_are_in_no_command_line_and_not_in_slurms_records(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*ONE_NODE) as job:
        async with open_fleet(config(job), tiny_model, log_dir=tmp_path) as fleet:
            (replica,) = fleet.replicas.by_name.values()
            (pid,) = processes_with(served(tiny_model), without="guard.py")
            environment = variables_of(pid)
            keys = [environment["MILLRACE_API_KEY"], environment["MILLRACE_ADMIN_API_KEY"]]
            assert all(len(key) > 20 for key in keys)
            shown = slurm.run("scontrol", "--details", "show", "steps") + slurm.run("scontrol", "show", "job", job)
            assert replica.engine.name in shown
            for key in keys:
                assert not processes_with(key)
                assert key not in shown


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", pytest.param("SIGKILL of all", marks=pytest.mark.slow)])
async def test_nothing_is_left_when_the_owner_ends(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path, end: str
) -> None:
    """`all` are the owner, its driver and every srun: then only the agents notice, by the driver's silence."""
    with slurm.job(*TWO_NODES) as job:
        async with owner("slurm", job, tiny_model, tmp_path) as process:
            assert len(slurm.steps(job)) == 2
            assert len(processes_with(served(tiny_model), without="guard.py")) == 2
            if end == "SIGKILL of all":
                for name in ("millrace.launch.slurm.driver", f"srun --jobid={job} "):
                    for pid in processes_with(name):
                        os.kill(pid, signal.SIGKILL)
            process.send_signal(signal.SIGINT if end == "SIGINT" else signal.SIGKILL)
            await eventually(lambda: process.poll() is not None, "the owner ends")
            deadline = SILENT_SECONDS + 30.0
            await eventually(lambda: not slurm.steps(job), "the steps end", deadline)
            for left in (served(tiny_model), AGENT, "millrace.launch.slurm.driver"):
                await eventually(lambda left=left: not processes_with(left), f"no {left} is left")
        async with open_slurm(job) as launcher:  # and Slurm has everything back
            await launcher.release(await launcher.reserve("all", Need(2, 2), 2, deadline=30))


async def test_a_job_that_ends_ends_its_engines_and_not_their_owner(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    with slurm.job(*ONE_NODE) as job:
        async with open_fleet(config(job), tiny_model, log_dir=tmp_path) as fleet:
            slurm.run("scancel", job)
            await eventually(lambda: not fleet.replicas.snapshot.usable, "the engine is dead")
            assert "embedded-0 ended with its Slurm step" in fleet.snapshot.describe()
            await eventually(lambda: not processes_with(served(tiny_model)), "the server ends")


async def test_the_parts_of_a_heterogeneous_job_have_engines(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path
) -> None:
    first = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--nodelist=n1")
    with slurm.job(*first, ":", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--gpus-per-node=2") as job:
        async with open_slurm(job) as launcher:
            (place,) = await launcher.reserve("gpu", Need(2, 1), 1, deadline=30)
            assert (place.host, place.gpus) == (NODES["n2"], "0,1")
            await launcher.release([place])
        async with open_fleet(config(job, replicas=2), tiny_model, log_dir=tmp_path) as fleet:
            assert engine_hosts(fleet) == [NODES["n1"], NODES["n2"]]
            assert (await fleet.generate(REQUEST, deadline=60)).output_ids


async def test_a_fleet_that_is_a_step_itself_keeps_its_own_gpu(slurm: SlurmCluster) -> None:
    """As docs/clusters.md says for trainers on GPUs. Slurm counts what the trainer's step has."""
    show = """
    import asyncio, os, sys
    from millrace.launch.base import Need
    from millrace.launch.slurm.launcher import open_slurm

    async def main():
        async with open_slurm(None) as launcher:
            places = [*await launcher.reserve("a", Need(1, 1), 1, deadline=30)]
            places += await launcher.reserve("b", Need(2, 2), 1, deadline=30)
            print("own", os.environ["CUDA_VISIBLE_DEVICES"], "others", *(place.gpus for place in places))

    asyncio.run(main())
    """
    with slurm.job(*TWO_NODES) as job:
        step = ("--exact", "--nodes=1", "--ntasks=1", "--gres=gpu:1", "--cpus-per-task=1", "--nodelist=n1")
        said = slurm.run("srun", f"--jobid={job}", *step, sys.executable, "-c", textwrap.dedent(show))
        assert "own 0 others 1 0,1" in said


async def test_the_tasks_of_a_job_array_are_jobs_of_their_own(slurm: SlurmCluster) -> None:
    number = slurm.run("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=2", "--wrap=sleep 60").strip()
    try:
        await eventually(lambda: slurm.run("squeue", "--noheader", "--format=%T").split() == ["RUNNING"] * 2, "it runs")
        jobs = [await read_job(one) for one in slurm.run("squeue", "--noheader", "--format=%A").split()]
        assert number in [str(job.number) for job in jobs]
        assert sorted(node.name for job in jobs for node in job.nodes) == ["n1", "n2"]
    finally:
        slurm.run("scancel", number)
        await eventually(lambda: not slurm.run("squeue", "--noheader"), "it ends")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sglang", "vllm"])
async def test_an_engine_over_two_nodes_runs_on_two_nodes_and_restarts_as_a_whole(
    slurm: SlurmCluster, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with slurm.job(*TWO_NODES) as job:
        hosts = (NODES["n1"], NODES["n2"])
        await require_runs_over_two_hosts(config(job, kind=kind), hosts, tiny_model, tmp_path, caplog)
        assert not slurm.steps(job)


@pytest.mark.slow
async def test_a_stock_engine_runs_in_a_job(slurm: SlurmCluster, tiny_model: Path, tmp_path: Path) -> None:
    with slurm.job(*ONE_NODE) as job:
        settings = config(job, kind="sglang", device="cpu", start_timeout=240.0)
        async with open_fleet(settings, tiny_model, log_dir=tmp_path) as fleet:
            assert engine_hosts(fleet) == [NODES["n1"]]
            assert len((await fleet.generate(REQUEST, deadline=60)).output_ids) == 4
        assert not processes_with(str(tiny_model))
        assert not slurm.steps(job)
