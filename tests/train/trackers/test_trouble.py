"""A tracker in trouble ends no run, delays no step, and costs one warning that says what to do."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from millrace.config import load_config
from millrace.errors import ConfigError
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.record import RunFolder
from millrace.train.trackers import recorder
from millrace.train.trackers.recorder import TrackerProcess, open_trackers
from tests.config.test_loading import VALID
from tests.launch.processes import alive
from tests.train.trackers.readers import READERS
from tests.train.trackers.test_trackers import INSTALLED, metrics, settings

pytestmark = pytest.mark.skipif("tensorboard" not in INSTALLED, reason="TensorBoard is not installed")


@asynccontextmanager
async def tracker(folder: Path, kind: str = "tensorboard") -> AsyncIterator[tuple[recorder.Trackers, TrackerProcess]]:
    run = RunFolder(settings(folder, kind), resume=False)
    display = Display(Console(quiet=True))
    with run.create():
        async with open_trackers(settings(folder, kind), run, resume=False, display=display) as trackers:
            [process] = trackers.processes
            yield trackers, process


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == recorder.__name__]


async def until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def test_a_tracker_that_hangs_delays_no_step_and_is_ended_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "END_SECONDS", 1.0)
    monkeypatch.setattr(recorder, "MOST_BYTES", 2**16)
    async with tracker(tmp_path) as (trackers, process):
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        for step in range(2000):
            trackers.figures(metrics(step, 0.5))
        assert time.monotonic() - started < 5
        [hangs] = warnings(caplog)
        assert "tracker tensorboard: it hangs, and records nothing more. The run continues; read " in hangs
    assert time.monotonic() - started < 10
    assert not alive(process.pid)
    assert "it did not end within 1 s, and may lack the last steps" in warnings(caplog)[1]
    assert len(warnings(caplog)) == 2


async def test_a_tracker_whose_process_is_killed_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with tracker(tmp_path) as (trackers, process):
        trackers.figures(metrics(1))
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: warnings(caplog))
        for step in range(2, 20):
            trackers.figures(metrics(step))
            await asyncio.sleep(0)
    [killed] = warnings(caplog)
    assert "its process ended with status -9, and records nothing more" in killed


async def test_a_signal_to_all_processes_of_a_job_does_not_end_a_tracker_before_its_run(tmp_path: Path) -> None:
    async with tracker(tmp_path) as (trackers, process):
        await until(lambda: list(tmp_path.glob("run/tensorboard/events*")))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process.pid, number)
        trackers.figures(metrics(1))
    recorded = READERS["tensorboard"](tmp_path / "run")
    assert (recorded.points["train/loss"], recorded.state) == ([(1, -0.5)], "finished")


async def test_a_tracker_that_cant_start_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file, where a folder should be")
    async with tracker(tmp_path) as (trackers, _):
        trackers.figures(metrics(1))
    [why] = warnings(caplog)
    assert "tracker tensorboard: it could not start: FileExistsError" in why
    assert "check that there is room on the disk" in why


async def test_a_full_disk_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with tracker(tmp_path) as (trackers, process):
        await until(lambda: list(tmp_path.glob("run/tensorboard/events*")))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))  # writes beyond it fail
        for step in range(1, 100):
            trackers.figures(metrics(step))
    assert 1 <= len(warnings(caplog)) <= 2
    assert "tracker tensorboard: " in warnings(caplog)[0]
    assert not alive(process.pid)


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
async def test_wandb_without_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    async with tracker(tmp_path, "wandb") as (trackers, _):
        trackers.figures(metrics(1))
    [why] = warnings(caplog)
    assert "No API key configured" in why
    assert "log in by `wandb login`, or set WANDB_MODE=offline and send the run later by `wandb sync`" in why


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="MLflow is not installed")
async def test_mlflow_without_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with tracker(tmp_path, "mlflow") as (trackers, _):
        trackers.figures(metrics(1))
    [why] = warnings(caplog)
    assert "127.0.0.1:9" in why
    assert "check MLFLOW_TRACKING_URI" in why


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in INSTALLED])
async def test_a_package_that_is_missing_is_refused_before_anything_starts(kind: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path}/runs", f"trackers=[{kind}]"])
    with pytest.raises(ConfigError, match=rf"trackers: {kind}: .*pip install 'millrace\[{kind}\]'"):
        await train(config, resume=False, display=Display(Console(quiet=True)))
    assert not (tmp_path / "runs").exists()
