"""Whole runs with rewards of the user: what is trained on, what is written down, and how failures end."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.models import EvaluationConfig, RolloutConfig, RunConfig, TrainConfig
from millrace.config.sources import FileDataConfig, TinyModelConfig
from millrace.errors import ConfigError, DataError, RolloutError
from millrace.rollout.sample import SampleStatus
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.sample_files import read_samples
from millrace.train.summary import Summary

REWARDS = """
calls = []

def apples(answer):
    return answer.count("e") / 10

async def longest(conversations, rows):
    calls.append(len(rows))
    lengths = [len(talk[-1]["content"]) for talk in conversations]
    return [float(length == max(lengths)) for length in lengths]

def fails_for_beans(row):
    if row["thing"] == "beans":
        raise ValueError("no beans")
    return 1.0

def fails(answer):
    raise ValueError("never")
"""
ROWS = [{"task": f"Write about {thing}.", "thing": thing} for thing in ("apples", "beans", "cards", "eggs")]


def settings(folder: Path, *reward: Any, **changes: Any) -> RunConfig:
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    data = FileDataConfig(kind="file", path=folder / "rows.jsonl", prompt="task")
    given: dict[str, Any] = {
        "name": "run",
        "output_dir": folder,
        "model": TinyModelConfig(kind="tiny", hidden_size=64, heads=2),
        "engine": EmbeddedEngineConfig(kind="embedded", threads=1),
        "data": data,
        "reward": [{"path": str(folder / "rewards.py"), **one} for one in reward] or None,
        "rollout": RolloutConfig(
            groups_per_step=2, samples_per_group=4, max_turns=1, max_turn_tokens=8, max_sample_tokens=160, tools=()
        ),
        "train": TrainConfig(steps=2, lr=1e-3),
        "evaluation": EvaluationConfig(data=data, every=10),
    }
    return RunConfig.model_validate(given | changes)


async def run(config: RunConfig) -> Summary:
    summary = await train(config, resume=False, display=Display(Console(quiet=True)))
    assert summary is not None
    return summary


def samples(folder: Path) -> list[dict[str, Any]]:
    return list(read_samples(folder / "run"))


async def test_the_reward_is_the_weighted_sum_and_each_part_is_written_down(tmp_path: Path) -> None:
    config = settings(tmp_path, {"name": "apples", "weight": 2.0}, {"name": "longest", "weight": 0.5})
    summary = await run(config)
    assert summary.counts.asked == summary.counts.ended[SampleStatus.FINISHED] == 16
    written = samples(tmp_path)
    assert len(written) == 16
    for sample in written:
        parts = sample["rewards"]
        assert parts.keys() == {"apples", "longest"}
        assert sample["reward"] == pytest.approx(2.0 * parts["apples"] + 0.5 * parts["longest"])
    for step in summary.metrics[1:]:
        own = [sample for sample in written if sample["step"] == step.step]
        assert step.reward == pytest.approx(sum(sample["reward"] for sample in own) / len(own))
        assert step.rewards == {
            name: pytest.approx(sum(sample["rewards"][name] for sample in own) / len(own))
            for name in ("apples", "longest")
        }
    groups = {sample["sample"].rpartition("-")[0] for sample in written if sample["rewards"]["longest"]}
    assert len(groups) == 4  # each group has a longest answer
    [module] = [one for one in sys.modules.values() if getattr(one, "__file__", None) == str(tmp_path / "rewards.py")]
    assert sorted(module.calls) == [1] * 8 + [4] * 4  # once for each group, and for each problem of two evaluations


async def test_a_reward_that_fails_costs_its_samples_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = await run(settings(tmp_path, {"name": "fails_for_beans"}))
    failed = [sample for sample in samples(tmp_path) if sample["status"] == "failed"]
    line = "the reward rewards.py:fails_for_beans failed for row rows-2: ValueError: no beans (rewards.py:14)"
    assert {sample["reason"] for sample in failed} == {line}
    assert summary.counts.ended[SampleStatus.FAILED] == len(failed) == sum(m.samples_failed for m in summary.metrics)
    assert summary.counts.asked == summary.counts.ended.total()
    assert f"samples failed and were left out; {failed[0]['sample']}: {line}" in caplog.text


async def test_a_reward_that_always_fails_ends_the_run_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"all 4 samples of the evaluation failed: the reward rewards.py:fails") as e:
        await run(settings(tmp_path, {"name": "fails"}))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("reward", "error", "says"),
    [
        ([], DataError, 'rows.jsonl, line 1: it has no column "answer", which the built-in reward needs'),
        ([{"name": "aples"}], ConfigError, "rewards.py has no 'aples'; did you mean 'apples'"),
    ],
)
async def test_what_cant_work_is_told_before_anything_is_made(
    tmp_path: Path, reward: list[Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await run(settings(tmp_path, *reward))
    assert not (tmp_path / "run").exists()
