"""The only engine of a run without a store is killed at every point of a step, and the run goes on."""

import asyncio
import io
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
from rich.console import Console

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.models import EvaluationConfig, RolloutConfig, RunConfig, TrainConfig
from millrace.config.sources import GeneratedDataConfig, PretrainedModelConfig
from millrace.rollout.sample import SampleStatus
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.sample_files import read_samples
from millrace.train.summary import print_summary
from tests.engines.processes import below, command_lines

STEPS, GROUPS, SAMPLES = 4, 6, 4
IN_THE_MIDDLE = 0.1  # seconds into a phase; a kill at any point must lose nothing

# The phase as the display shows it, and the number of such phases before.
KILLS = {
    ("evaluating on", 0): IN_THE_MIDDLE,
    ("generating: 1 of", 0): 0.0,  # one group is complete, and others are not
    ("training on", 1): 0.0,  # the engine is asleep, in mode hybrid
    ("publishing version 4", 0): 0.0,
    ("generating: 1 of", 3): 0.0,
}


class Killer(Display):
    """Kills the engine when a phase begins, or shortly after."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.left = dict(KILLS)
        self._others = below(os.getpid())  # engines of other tests
        self._seen: Counter[str] = Counter()

    def phase(self, text: str) -> None:
        for name in {name for name, _ in KILLS if text.startswith(name)}:
            delay = self.left.pop((name, self._seen[name]), None)
            self._seen[name] += 1
            if delay is not None:
                asyncio.get_running_loop().call_later(delay, self._kill_the_engine)
        super().phase(text)

    def _kill_the_engine(self) -> None:
        [engine] = [pid for pid in below(os.getpid()) - self._others if is_engine(command_lines({pid}))]
        os.kill(engine, signal.SIGKILL)


def is_engine(command: str) -> bool:
    return "millrace.engines.embedded" in command and "guard.py" not in command


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("mode", ["hybrid", pytest.param("standalone", marks=pytest.mark.slow)])
async def test_nothing_is_lost_and_the_run_ends(
    mode: Literal["hybrid", "standalone"],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("millrace.fleet.supervisor.FIRST_DELAY", 0.01)
    data = GeneratedDataConfig(kind="generated", seed=1, problems=64)
    config = RunConfig(
        name="run",
        mode=mode,
        output_dir=tmp_path,
        model=PretrainedModelConfig(kind="pretrained", path=str(tiny_model)),
        engine=EmbeddedEngineConfig(kind="embedded", threads=1),
        data=data,
        rollout=RolloutConfig(
            groups_per_step=GROUPS,
            samples_per_group=SAMPLES,
            max_turn_tokens=32,
            max_sample_tokens=200,
            max_staleness=1,
        ),
        train=TrainConfig(steps=STEPS, lr=1e-3, threads=1),
        evaluation=EvaluationConfig(data=data, problems=24, every=1000),
        restarts=len(KILLS),
    )
    display = Killer()
    async with asyncio.timeout(600):
        summary = await train(config, resume=False, display=display)
    assert summary is not None
    assert display.left == {}
    assert +summary.counts.ended == {SampleStatus.FINISHED: summary.counts.asked}
    run = tmp_path / "run"
    metrics, advice, events = (lines(run / f"{name}.jsonl") for name in ("metrics", "advice", "events"))
    samples = list(read_samples(run))
    assert [step["samples_finished"] for step in metrics] == [0] + [GROUPS * SAMPLES] * STEPS
    assert [step["weight_version"] for step in metrics] == list(range(1, STEPS + 2))
    assert set(Counter(sample["sample"] for sample in samples).values()) == {1}
    assert len(samples) == STEPS * GROUPS * SAMPLES
    for sample in samples:
        assert sample["status"] == "finished"
        versions = {sample["oldest_version"], sample["newest_version"]}
        assert versions == {sample["step"]} if mode == "hybrid" else versions <= {sample["step"] - 1, sample["step"]}
    ended = Counter(event["kind"] for event in events if "restart" in event["kind"])
    assert ended == {"restart": len(KILLS)}
    # Random weights answer nothing right, and the run says so.
    assert [step["groups_with_signal"] for step in metrics] == [None] + [0] * STEPS
    assert caplog.text.count("step 1 taught nothing: the rewards of each group are all equal") == 1
    assert caplog.text.count("taught nothing") == 1
    assert [one["step"] for one in advice if one["kind"] == "no_signal"] == [1]
    console = Console(file=io.StringIO(), width=200)
    print_summary(summary, console)
    assert "No step had a group whose rewards differed" in console.file.getvalue()  # type: ignore[attr-defined]
