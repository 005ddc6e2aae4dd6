"""The examples of tasks of one's own run, here for two steps, and the dry run says what they are."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from millrace.cli import app
from millrace.config import load_config
from millrace.rollout.sample import SampleStatus
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.sample_files import read_samples
from millrace.train.summary import Summary

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["train.steps=2", "rollout.groups_per_step=2", "evaluation.problems=2"]


async def run(name: str, folder: Path, *overrides: str) -> tuple[Summary, list[dict[str, Any]]]:
    config = load_config(EXAMPLES / name / "run.yaml", [*SHORT, f"output_dir={folder}", *overrides])
    summary = await train(config, resume=False, display=Display(Console(quiet=True)))
    assert summary is not None
    assert summary.counts.asked == summary.counts.ended[SampleStatus.FINISHED] == 2 * 2 * 8
    assert [step.weight_version for step in summary.metrics] == [1, 2, 3]
    samples = [{**sample, "text": sample["sequences"][-1]["text"]} for sample in read_samples(summary.folder)]
    return summary, samples


async def test_own_reward(tmp_path: Path) -> None:
    summary, samples = await run("own_reward", tmp_path)
    assert summary.metrics[-1].rewards.keys() == {"letters", "mentions", "shortest"}
    assert all("You need things." in sample["text"] for sample in samples)
    assert all(0 <= value <= 1 for sample in samples for value in sample["rewards"].values())
    assert any(sample["rewards"]["letters"] for sample in samples)


async def test_own_tool(tmp_path: Path) -> None:
    _, samples = await run("own_tool", tmp_path, "warmup.steps=2")
    assert all("Tools: note, calculator" in sample["text"] for sample in samples)


async def test_mcp_tools(tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="the extra millrace[mcp] is not installed")
    server = f"rollout.tools=[{{mcp: {{command: [{sys.executable}, server.py]}}}}]"
    _, samples = await run("mcp_tools", tmp_path, "warmup.steps=2", server)
    assert all("Tools: calculator" in sample["text"] for sample in samples)


async def test_text_game(tmp_path: Path) -> None:
    summary, samples = await run("text_game", tmp_path)
    assert summary.metrics[-1].rewards == {"environment": summary.metrics[-1].reward}
    assert {sample["end"] for sample in samples} <= {"environment_done", "turn_limit", "token_limit"}
    for sample in samples:
        assert sample["text"].startswith("<|im_start|>user\nHow many coins are there?<|im_end|>\n")
        assert sample["text"].count("<|im_start|>assistant\n") == sample["turns"]
        assert sample["reward"] == pytest.approx(sample["rewards"]["environment"])
    assert any(sample["turns"] > 1 for sample in samples)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("openai_agent", "openai"),
        pytest.param("anthropic_agent", "anthropic", marks=pytest.mark.slow),
        pytest.param("agents_sdk", "agents", marks=pytest.mark.slow),
    ],
)
async def test_agents(tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    short = ["warmup.steps=2", "rollout.samples_per_group=8", f"agent={name}.py:solve"]
    summary, samples = await run("agents", tmp_path, *short)
    assert all("Tools: calculator" in sample["text"] for sample in samples)
    assert all(sample["counts"]["requests"] == sample["turns"] for sample in samples)
    assert [step.requests for step in summary.metrics[1:]] == [
        sum(sample["turns"] for sample in samples if sample["step"] == step) for step in (1, 2)
    ]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """The folder in which make.py has drawn its images and made its model."""
    make = [sys.executable, str(EXAMPLES / "colored_shapes" / "make.py")]
    subprocess.run(make, check=True, cwd=tmp_path, timeout=400, stdout=subprocess.DEVNULL)
    return tmp_path


@pytest.mark.slow
async def test_colored_shapes(
    shapes: Path, sglang_python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real SGLang. The trainer computes the logprobs that the engine sampled with, also after an update."""
    monkeypatch.chdir(shapes)
    engine = [f"engine.python={sglang_python('0.5.23')}", "engine.version=0.5.23", "engine.start_timeout=400"]
    summary, samples = await run("colored_shapes", shapes, *engine)
    assert all(len(sample["images"]) == 1 for sample in samples)
    assert all(sample["text"].count("<|image_pad|>") == 1 for sample in samples)
    assert len({sample["images"][0] for sample in samples}) == 4
    gaps = [step.logprob_gap for step in summary.metrics[1:]]
    assert all(gap is not None and gap < 1e-4 for gap in gaps)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_reward", ["# data: 8 problems; the longest prompt, prompts-", "# evaluation: 4 problems; the longest",
                        "# reward: reward.py:letters x 1, reward.py:mentions x 2, reward.py:shortest x 0.1 (whole",
                        "# tools: none"]),
        ("own_tool", ["# data: 4096 problems; the longest prompt, generated-train-1-",
                      "# reward: millrace.rollout.reward:gsm8k x 1", "# tools: note, calculator"]),
        ("text_game", ["# data: 8 problems; the environment makes the prompts",
                       "# environment: env.py:GuessNumber; its tools: none"]),
        ("agents", ["# data: 4096 problems; the agent makes the prompts", "# agent: openai_agent.py:solve, 64 at once",
                    "# reward: millrace.rollout.reward:gsm8k x 1"]),
        ("gsm8k_multiturn", ["# data: 4096 problems; the longest prompt", "# tools: calculator"]),
    ],
)  # fmt: skip
def test_the_dry_run_says_what_it_found(name: str, says: list[str], tmp_path: Path) -> None:
    file = "cpu.yaml" if name == "gsm8k_multiturn" else "run.yaml"
    result = CliRunner().invoke(app, ["train", str(EXAMPLES / name / file), "--dry-run", f"output_dir={tmp_path}"])
    assert result.exit_code == 0, result.output
    for line in says:
        assert f"\n{line}" in result.output
    assert list(tmp_path.iterdir()) == []
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load_config(again) == load_config(EXAMPLES / name / file, [f"output_dir={tmp_path}"])
