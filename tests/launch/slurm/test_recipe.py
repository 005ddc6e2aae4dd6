"""The script for sbatch in docs/clusters.md trains, is requeued and resumes, on a real Slurm: `make test-slurm`."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.launch.processes import processes_with
from tests.launch.slurm.cluster import GRACE_SECONDS, TWO_NODES, SlurmCluster, until, why_no_slurm

pytestmark = [pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())), pytest.mark.slow]

RUN = """\
model: {{kind: pretrained, path: {model}}}
engine: {{kind: embedded, replicas: 2, threads: 1}}
data: {{kind: generated, seed: 1, problems: 64}}
rollout: {{groups_per_step: 2, samples_per_group: 2, max_turns: 2, max_turn_tokens: 16, max_sample_tokens: 160}}
train: {{steps: 12, lr: 1e-3, device: cpu}}
evaluation: {{data: {{kind: generated, seed: 3, problems: 4}}, every: 1000}}
checkpoint: {{every: 1}}
"""


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """The script of docs/clusters.md in a folder with a run's settings."""
    docs = (Path(__file__).parents[3] / "docs/clusters.md").read_text()
    found = re.search(r"`train.sbatch`:\n\n```bash\n(.*?)```", docs, re.DOTALL)
    assert found is not None
    (tmp_path / "train.sbatch").write_text(found[1])
    (tmp_path / "run.yaml").write_text(RUN.format(model=tiny_model))
    return tmp_path


def without_checkpoints(recipe: Path) -> None:
    """Let the run save a checkpoint only at its end, or when it is asked to end."""
    settings = recipe / "run.yaml"
    settings.write_text(settings.read_text().replace("checkpoint: {every: 1}", "checkpoint: {every: 1000}"))


def submit(slurm: SlurmCluster, recipe: Path, *options: str) -> str:
    """Submit the script, and return the job's id."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    small = ("--cpus-per-task=2", "--gpus-per-node=2", f"--chdir={recipe}", *options)
    return slurm.run("sbatch", "--parsable", *small, str(recipe / "train.sbatch"), PATH=path).strip()


def requeued(slurm: SlurmCluster, recipe: Path, job: str) -> None:
    """Wait until a job is requeued, and check that nothing of it runs on."""
    until(lambda: slurm.state(job) == "PENDING", "the job is requeued")
    assert not processes_with(f"{recipe}/runs"), "what the first run had started runs on"


def resumed(slurm: SlurmCluster, recipe: Path, job: str) -> None:
    """Wait for the end of a job that was requeued, and check that its run has resumed and ended."""
    log, run = recipe / f"gsm8k-{job}.log", recipe / f"runs/gsm8k-{job}"
    until(lambda: "resumed after step" in log.read_text() or not slurm.state(job), "the run resumes", 180)
    until(lambda: not slurm.state(job), "the job ends", 180)
    assert "resumed after step" in log.read_text(), log.read_text()
    assert steps_of(run) == list(range(13)), log.read_text()


def steps_of(run: Path) -> list[int]:
    """Return the steps of a run that have ended."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def begun(slurm: SlurmCluster, recipe: Path, *options: str) -> str:
    """Submit the script, wait until its run has made a step, and return the job's id."""
    job = submit(slurm, recipe, *options)
    log, run = recipe / f"gsm8k-{job}.log", recipe / f"runs/gsm8k-{job}"
    until(lambda: steps_of(run) > [0] or not slurm.state(job), "a step is made", 180)
    assert slurm.state(job) == "RUNNING", log.read_text()
    assert len(slurm.steps(job)) == 3  # the trainer's and two engines'
    return job


def test_a_preempted_run_of_the_recipe_resumes_from_its_last_checkpoint(slurm: SlurmCluster, recipe: Path) -> None:
    """Without a GraceTime: there are only the five seconds of KillWait to save one."""
    job = begun(slurm, recipe)
    until(lambda: any(recipe.glob(f"runs/gsm8k-{job}/checkpoints/step-*")), "a checkpoint is written")
    with slurm.job("--partition=urgent", *TWO_NODES):
        requeued(slurm, recipe, job)
    resumed(slurm, recipe, job)


@pytest.mark.parametrize("partition", ["grace", "cancelled"])
def test_a_run_of_the_recipe_that_is_preempted_with_grace_saves_a_checkpoint_in_the_time_and_resumes(
    slurm: SlurmCluster, recipe: Path, partition: str
) -> None:
    """By PreemptMode=REQUEUE and by CANCEL. The run would save its first checkpoint at its end."""
    without_checkpoints(recipe)
    job = begun(slurm, recipe, f"--partition={partition}")
    log, checkpoints = recipe / f"gsm8k-{job}.log", recipe / f"runs/gsm8k-{job}/checkpoints"
    assert not list(checkpoints.glob("step-*"))
    preempted = time.monotonic()
    with slurm.job("--partition=urgent", *TWO_NODES):
        assert time.monotonic() - preempted < GRACE_SECONDS
        requeued(slurm, recipe, job)
        assert "ended by SIGTERM: --resume continues" in log.read_text()
        assert len(list(checkpoints.glob("step-*"))) == 1
    resumed(slurm, recipe, job)


def test_a_cancelled_run_of_the_recipe_saves_a_checkpoint(slurm: SlurmCluster, recipe: Path) -> None:
    """Slurm sends SIGTERM to the trainer and to the script, which asks the trainer too."""
    without_checkpoints(recipe)
    job = begun(slurm, recipe)
    slurm.run("scancel", job)
    until(lambda: not slurm.state(job), "the job ends")
    log = (recipe / f"gsm8k-{job}.log").read_text()
    assert re.search(r"ended by SIG(TERM|USR1): --resume continues", log), log
    assert not processes_with(str(recipe))


def test_the_recipe_requeues_its_job_before_the_time_limit(slurm: SlurmCluster, recipe: Path) -> None:
    job = begun(slurm, recipe)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # as Slurm does by --signal=B:USR1@120
    requeued(slurm, recipe, job)
    assert "ended by SIGUSR1: --resume continues" in (recipe / f"gsm8k-{job}.log").read_text()
    resumed(slurm, recipe, job)


def test_sigterm_to_the_recipe_ends_its_run_and_engines(slurm: SlurmCluster, recipe: Path) -> None:
    job = begun(slurm, recipe)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    until(lambda: not slurm.state(job), "the job ends")
    assert "ended by SIGUSR1: --resume continues" in (recipe / f"gsm8k-{job}.log").read_text()
    assert "ExitCode=0:0" not in slurm.run("scontrol", "show", "job", job).split()
    assert not processes_with(str(recipe))
