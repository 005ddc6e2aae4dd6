"""Whole runs with a judge, which either takes turns with the policy or has its own engines."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.models import EvaluationConfig, JudgeConfig, RolloutConfig, RunConfig, TrainConfig
from millrace.config.sources import GeneratedDataConfig, PretrainedModelConfig, TinyModelConfig
from millrace.errors import DataError
from millrace.rollout.reward import rule_reward
from millrace.rollout.sample import SampleStatus
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.sample_files import read_samples
from tests.rollout.digits import make_judge_model

ENGINE = EmbeddedEngineConfig(kind="embedded", threads=1)
DATA = GeneratedDataConfig(kind="generated", seed=1, problems=4)


def settings(folder: Path, **judge: Any) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=folder,
        model=TinyModelConfig(kind="tiny", hidden_size=64, heads=2),
        engine=ENGINE,
        data=DATA,
        rollout=RolloutConfig(
            groups_per_step=2, samples_per_group=4, max_turns=1, max_turn_tokens=8, max_sample_tokens=160
        ),
        train=TrainConfig(steps=2, lr=1e-3),
        evaluation=EvaluationConfig(data=DATA, every=10),
        judges=JudgeConfig(
            model=PretrainedModelConfig(kind="pretrained", path=str(folder / "judge-model")),
            engine=ENGINE,
            template="{question} {answer} #### {reference}",
            verdict=r"(\d)",
            best=9,
            max_new_tokens=12,
            **judge,
        ),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["colocated", "standalone"])
async def test_a_run_is_rewarded_by_its_judge(tmp_path: Path, mode: str) -> None:
    make_judge_model(tmp_path / "judge-model")
    summary = await train(settings(tmp_path, mode=mode), resume=False, display=Display(Console(quiet=True)))
    assert summary is not None
    assert summary.counts.asked == summary.counts.ended[SampleStatus.FINISHED] == 16
    steps = summary.metrics[1:]
    assert [step.grades for step in steps] == [8, 8]
    assert [step.reward for step in steps] == pytest.approx([step.grade for step in steps])
    samples = list(read_samples(tmp_path / "run"))
    assert all(round(sample["reward"] * 9) == pytest.approx(sample["reward"] * 9) for sample in samples)
    by_rule = [rule_reward(sample["sequences"][-1]["text"], sample["answer"]) for sample in samples]
    assert [sample["reward"] for sample in samples] != by_rule

    events = [e for e in lines(tmp_path / "run" / "events.jsonl") if e["kind"] == "member"]
    judge = [(e["version"], e["asleep"]) for e in events if e["engine"] == "judge-0"]
    assert {version for version, _ in judge} == {0, None}  # the version of its start, and no other
    if mode == "standalone":
        assert {asleep for _, asleep in judge} == {None}
        return
    assert judge.count((0, None)) == 1 + 2  # it serves after its start and once a step, each time attested
    assert all(step.judge_seconds for step in steps)
    awake = dict[str, bool]()
    for event in events:
        awake[event["engine"]] = event["asleep"] is None
        assert [*awake.values()] != [True, True]


async def test_a_judges_model_is_looked_at_before_any_engine_is_started(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="judges.model.path: .* is no model's folder"):
        await train(settings(tmp_path), resume=False, display=Display(Console(quiet=True)))
    assert not (tmp_path / "run" / "logs").exists()
