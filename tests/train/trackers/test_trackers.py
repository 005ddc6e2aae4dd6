"""Each tracker has what a run recorded, read back by its own reader. Packages that are not installed are skipped:
`make test-trackers` has all."""

import asyncio
import html
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from millrace.config import RunConfig, load_config
from millrace.errors import DataError
from millrace.rollout.chat import check_chat_format
from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.train.display import Display
from millrace.train.metrics import StepMetrics
from millrace.train.record import RunFolder
from millrace.train.tiny import make_tiny_tokenizer
from millrace.train.trackers.recorder import open_trackers
from tests.config.test_loading import VALID
from tests.launch.processes import alive
from tests.train.trackers.readers import READERS

INSTALLED = [kind for kind in READERS if importlib.util.find_spec(kind)]
CHAT = check_chat_format(make_tiny_tokenizer(), "model", (), {})
ANSWER = "#### 15 * 1"


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.skipif(k not in INSTALLED, reason="missing")) for k in READERS]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(folder: Path, *kinds: str) -> RunConfig:
    (folder / "run.yaml").write_text(VALID)
    return load_config(folder / "run.yaml", [f"output_dir={folder}", "name=run", f"trackers=[{','.join(kinds)}]"])


def metrics(step: int, reward: float | None = 0.0) -> StepMetrics:
    if reward is None:
        return StepMetrics(step, step + 1, accuracy=0.25)
    return StepMetrics(
        step,
        step + 1,
        None,
        reward=reward,
        rewards={"exact": reward},
        loss=-0.5,
        train_seconds=1.5,
        samples_finished=16,
    )


def sample(name: str, reward: float) -> Sample:
    prompt, answer = CHAT.prompt("Lena has 15 pens"), CHAT.turn(ANSWER)
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    episode = Episode((*prompt, *answer), mask, np.zeros(len(mask), np.float32), (), 1, EpisodeEnd.ANSWERED)
    problem = Problem.of_question("p1", "Lena has 15 pens | #4 <b>", "15")
    return Sample(name, "g1", problem, SampleStatus.FINISHED, episode, reward)


async def record(config: RunConfig, steps: range, *, resume: bool = False, error: BaseException | None = None) -> None:
    folder = RunFolder(config, resume=resume)
    with folder.create():
        async with open_trackers(config, folder, resume=resume, display=Display(Console(quiet=True))) as trackers:
            if resume:
                trackers.resumed_at(steps[0] - 1)
            for step in steps:
                trackers.figures(metrics(step, None if step == 0 else float(step)))
                if step:
                    trackers.samples(step, [sample(f"{step}-{i}", 0.5) for i in range(2)], CHAT)
            folder.metrics_path.touch()
            if error is not None:
                raise error


async def test_a_run_is_recorded_with_its_settings_figures_and_samples(kind: str, tmp_path: Path) -> None:
    await record(settings(tmp_path, kind), range(4))
    read = READERS[kind](tmp_path / "run")
    assert read.points["eval/accuracy"] == [(0, 0.25)]
    assert read.points["rollout/reward"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert read.points["reward/exact"] == read.points["rollout/reward"]
    assert read.points["train/loss"] == [(step, -0.5) for step in (1, 2, 3)]
    assert read.points["time/train"] == [(step, 1.5) for step in (1, 2, 3)]
    assert dict(read.points["rollout/weight_version"]) == {0: 1, 1: 2, 2: 3, 3: 4}
    assert {name.partition("/")[0] for name in read.points} == {"eval", "reward", "rollout", "time", "train"}
    assert {step: [row["sample"] for row in rows] for step, rows in read.rows.items()} == {
        step: [f"{step}-0", f"{step}-1"] for step in (1, 2, 3)
    }
    row = {name: html.unescape(str(value)) for name, value in read.rows[3][1].items()}  # TensorBoard's texts are HTML
    assert row == {
        "sample": "3-1", "prompt": "user: Lena has 15 pens | #4 <b>", "answer": CHAT.decode(CHAT.turn(ANSWER)),
        "reward": "0.5", "tokens": str(len(CHAT.turn(ANSWER))), "turns": "1", "end": "answered",
    }  # fmt: skip
    assert read.settings.get("train.lr") == "0.001" or read.settings["train"]["lr"] == 0.001
    assert (read.state, read.runs) == ("finished", 1)
    assert not (tmp_path / "run" / "logs" / f"tracker-{kind}.log").stat().st_mode & 0o077


async def test_a_resumed_run_continues_the_one_that_the_tracker_has(kind: str, tmp_path: Path) -> None:
    config = settings(tmp_path, kind)
    with pytest.raises(asyncio.CancelledError):
        await record(config, range(1, 4), error=asyncio.CancelledError())
    assert READERS[kind](tmp_path / "run").state == "interrupted"
    await record(config, range(3, 6), resume=True)
    read = READERS[kind](tmp_path / "run")
    again = [] if kind == "tensorboard" else [(3, 3.0)]  # the others keep what they have
    assert read.points["rollout/reward"] == [(1, 1.0), (2, 2.0), *again, (3, 3.0), (4, 4.0), (5, 5.0)]
    assert read.runs == 1
    assert read.state == "finished" or kind == "trackio"  # whose alerts stay


async def test_an_error_of_the_run_is_its_state(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        await record(settings(tmp_path, kind), range(1, 2), error=DataError("no room"))
    assert READERS[kind](tmp_path / "run").state == "failed"


def test_a_killed_trainer_leaves_an_interrupted_run(kind: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.train.trackers.trainer", str(tmp_path), kind]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        assert trainer.stdout.readline().startswith(f"{kind}: ")  # where the run is, when it has been started there
        trainer.kill()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    read = READERS[kind](tmp_path / "run")
    assert (read.state, read.points["train/loss"]) == ("interrupted", [(1, -0.5)])
