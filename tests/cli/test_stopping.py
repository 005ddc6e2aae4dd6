"""`millrace train` on the signals of clusters: it saves a checkpoint and ends, and a resumed run goes on from there."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.train import stopping
from tests.cli.test_errors import CONFIG, checkpoints, engines, finish, records, start, steps, wait_until
from tests.torchrun import ROOT, environment, torchrun

MODES = ("hybrid", "standalone")
MANY = ("train.steps=400", "checkpoint.every=1000")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """Makes a folder with a run's settings."""
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tiny_model))
    return tmp_path


def begun(folder: Path, step: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a run, and return its process when it has recorded a step."""
    process = start(folder, *MANY, *arguments)
    wait_until(lambda: step in steps(folder) or process.poll() is not None)
    return process


def require_resumable(folder: Path, *arguments: str) -> None:
    """The one checkpoint is of the last recorded step, and a run that resumes from it has every step and version."""
    last = steps(folder)[-1]
    assert checkpoints(folder) == [f"step-{last:08d}"]
    status, out, err = finish(start(folder, "--resume", f"train.steps={last + 2}", *arguments), folder)
    assert status == 0, err
    assert f"resumed after step {last} from" in out
    assert f"since it was resumed after step {last}: " in out
    assert steps(folder) == list(range(last + 3))
    assert [record["weight_version"] for record in records(folder)] == list(range(1, last + 4))


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        pytest.param(signal.SIGTERM, "hybrid", id="SIGTERM"),
        pytest.param(signal.SIGUSR1, "standalone", id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint(folder: Path, number: signal.Signals, mode: str) -> None:
    process = begun(folder, 2, f"mode={mode}")
    process.send_signal(number)
    status, out, err = finish(process, folder)
    assert status == 128 + number, err
    assert f"{number.name}: the run saves a checkpoint and ends" in err
    assert f"ended by {number.name}: --resume continues from" in err
    assert "first and last" in out
    assert (folder / "run" / "curves.png").exists()
    require_resumable(folder, f"mode={mode}")


@pytest.mark.parametrize(
    ("mode", "delay"),
    [
        ("standalone", 0.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(MODES, (0.05, 0.1, 0.2, 0.3))),
    ],
)
def test_the_checkpoint_is_written_although_the_engines_got_the_signal_too(
    folder: Path, mode: str, delay: float
) -> None:
    """As Slurm does with a job that it preempts."""
    process = begun(folder, 1, f"mode={mode}")
    with pytest.raises(subprocess.TimeoutExpired):  # so it comes in another part of a step
        process.wait(delay + 0.001)
    for pid in [*engines(folder), process.pid]:
        os.kill(pid, signal.SIGTERM)
    status, _, err = finish(process, folder)
    assert status == 128 + signal.SIGTERM, err
    require_resumable(folder, f"mode={mode}")


@pytest.mark.slow
def test_a_signal_in_the_first_evaluation_keeps_the_warm_up(folder: Path) -> None:
    process = start(folder, *MANY, "evaluation.data.problems=4000")
    log = folder / "run/events.jsonl"
    wait_until(lambda: (log.exists() and b'"kind":"request"' in log.read_bytes()) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process, folder)
    assert status == 128 + signal.SIGTERM, err
    assert records(folder)[0]["accuracy"] is None
    require_resumable(folder)
    assert records(folder)[0]["accuracy"] is not None


def test_a_signal_before_the_first_step_ends_the_run_at_once(folder: Path) -> None:
    process = start(folder, *MANY)
    wait_until(lambda: engines(folder) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process, folder)
    assert status == 128 + signal.SIGTERM, err
    assert "ended by SIGTERM: the run had not begun" in err
    assert "Traceback" not in err


def test_signals_that_come_together_are_one(folder: Path) -> None:
    """As Slurm sends them at the end of a job, and as its script passes them on."""
    process = begun(folder, 1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    status, _, err = finish(process, folder)
    assert status in (128 + signal.SIGTERM, 128 + signal.SIGUSR1), err  # whichever the kernel has delivered first
    assert "Traceback" not in err
    require_resumable(folder)


async def test_a_later_signal_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "TOGETHER_SECONDS", 0.5)
    stop, saving = stopping.Stop(), asyncio.Event()
    stop.saves = True

    async def run() -> None:
        with stop.on_signals():
            saving.set()
            await asyncio.sleep(60)

    running = asyncio.create_task(run())
    await saving.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(TimeoutError):  # it saves
        await asyncio.wait_for(asyncio.shield(running), 0.6)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 30)
    assert stop.signal is signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "to"), [("hybrid", "rank 1"), ("standalone", "torchrun")])
def test_all_ranks_save_the_same_step(folder: Path, mode: str, to: str) -> None:
    """Also if only one of them gets the signal."""
    wanted = (
        "-m",
        "millrace",
        "train",
        str(folder / "run.yaml"),
        f"output_dir={folder}",
        f"mode={mode}",
        "train.threads=1",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *wanted, *MANY]
    with (folder / "ranks.log").open("wb") as log:
        torch_run = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        wait_until(lambda: 2 in steps(folder) or torch_run.poll() is not None)
        os.kill(rank_below(torch_run.pid, 1) if to == "rank 1" else torch_run.pid, signal.SIGTERM)
        torch_run.wait(120)
    finally:
        torch_run.kill()
        torch_run.wait()
    last = steps(folder)[-1]
    assert checkpoints(folder) == [f"step-{last:08d}"], (folder / "ranks.log").read_text()
    torchrun(*wanted, f"train.steps={last + 1}", "--resume")
    assert [record["weight_version"] for record in records(folder)] == list(range(1, last + 3))


def rank_below(parent: int, rank: int) -> int:
    """Return the process id of a rank that torchrun has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            below = f"PPid:\t{parent}\n" in (path / "status").read_text()
            if below and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"torchrun has no rank {rank}")
