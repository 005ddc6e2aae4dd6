"""How a run starts and resumes. No test here starts an engine."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from millrace.config.engines import SGLangEngineConfig
from millrace.config.models import EvaluationConfig, RolloutConfig, RunConfig, TrainConfig
from millrace.config.sources import GeneratedDataConfig, TinyModelConfig
from millrace.errors import CheckpointError, LaunchError
from millrace.train.display import Display
from millrace.train.experiment import how_to_go_on, starting_model, train


def settings(folder: Path, *, hidden_size: int = 64) -> RunConfig:
    data = GeneratedDataConfig(kind="generated", seed=1, problems=4)
    return RunConfig(
        name="run",
        output_dir=folder,
        model=TinyModelConfig(kind="tiny", hidden_size=hidden_size),
        engine=SGLangEngineConfig(kind="sglang", device="cpu"),  # its environment does not exist
        data=data,
        rollout=RolloutConfig(groups_per_step=2, samples_per_group=2, max_turn_tokens=16, max_sample_tokens=160),
        train=TrainConfig(steps=1, lr=1e-3),
        evaluation=EvaluationConfig(data=data),
    )


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


async def start(config: RunConfig, *, resume: bool = False) -> None:
    await train(config, resume=resume, display=Display(Console(quiet=True)))


@pytest.mark.parametrize("resume", [False, True])
async def test_a_run_without_a_checkpoint_is_refused_before_anything_is_made(tmp_path: Path, resume: bool) -> None:
    write(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(
        CheckpointError, match=r"run holds a run that has no checkpoint to resume from: .*; give another"
    ):
        await start(settings(tmp_path), resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


async def test_after_a_failed_start_the_same_name_can_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path / "home"))
    for hidden_size in (64, 128):
        with pytest.raises(LaunchError, match="millrace engines install sglang"):
            await start(settings(tmp_path, hidden_size=hidden_size))
        made = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
        assert made["hidden_size"] == hidden_size  # the failed start left another value


def test_a_run_that_resumes_keeps_its_model(tmp_path: Path) -> None:
    starting_model(settings(tmp_path), tmp_path, fresh=True)
    starting_model(settings(tmp_path, hidden_size=128), tmp_path, fresh=False)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"] == 64


def test_an_interrupted_run_promises_only_a_resume_that_works(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert "the same command starts it again" in how_to_go_on(config)
    write(tmp_path / "run" / "metrics.jsonl")
    assert "no checkpoint to resume from: checkpoint.every was not reached" in how_to_go_on(config)
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert how_to_go_on(config).endswith("run/checkpoints/step-00000003")
