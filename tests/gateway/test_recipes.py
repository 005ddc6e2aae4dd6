"""`millrace train` with real agents, by the configs of examples/cli_agents: `make test-agents`.

A small model on the embedded engine plays them. Of the turns that it may write, one solves the task.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.train.sample_files import read_samples
from tests.gateway.agents.alone import AGENTS, ALONE, NEEDS_AGENTS
from tests.gateway.agents.policy import make_policy
from tests.gateway.qwen import call

pytestmark = NEEDS_AGENTS

RECIPES = Path(__file__).parents[2] / "examples" / "cli_agents"
SOLVE = "echo 42 > answer.txt"
ROW = {"task": "Write 42 to answer.txt.", "test": "assert open('answer.txt').read() == '42\\n'"}
SHORT = [
    "engine={kind: embedded, threads: 1, cached_prefixes: 4}", "rollout.groups_per_step=1",
    "rollout.samples_per_group=3", "rollout.max_turns=6", "train.steps=1", "train.lr=1e-3", "train.device=cpu",
    "train.dtype=float32", "evaluation.problems=1", "agent.concurrency=2", "agent.keep=all",
]  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    folder: Path

    def log(self, sample: str) -> str:
        """What an agent wrote."""
        return (self.folder / "agents" / sample / "agent.log").read_text(errors="replace")


def train(name: str, folder: Path, turns: list[str]) -> Trained:
    """Trains by a recipe for one step, on one task."""
    make_policy(folder / "model", turns)
    (folder / "tasks.jsonl").write_text(f"{json.dumps(ROW)}\n")
    path = [str(AGENTS / "node_modules" / ".bin"), str(AGENTS / "mini-swe-agent" / "bin"), os.environ["PATH"]]
    data = f"{{kind: file, path: {folder}/tasks.jsonl, prompt: task}}"
    own = [f"output_dir={folder}", "name=run", f"model.path={folder}/model", f"data={data}", f"evaluation.data={data}"]
    command = [sys.executable, "-m", "millrace", "train", str(RECIPES / f"{name}.yaml"), *own, *SHORT]
    subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.gateway.agents.alone", str(folder), *command],
        check=True,
        timeout=500,
        env={**os.environ, "PATH": os.pathsep.join(path)},
    )
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return Trained(metrics, list(read_samples(folder / "run")), folder / "run")


def check(trained: Trained, branches: set[str]) -> None:
    """Asserts what holds for each agent.

    branches: the reasons that it may have. The trainer computes the logprobs of the sampled tokens again, and they are
    the engine's only if it reads what the engine read.
    """
    assert [step["weight_version"] for step in trained.metrics] == [1, 2]
    assert [sample["status"] for sample in trained.samples] == ["finished"] * 3
    for sample in trained.samples:
        sequences = sample["sequences"]
        assert sample["reward"] == float(SOLVE in " ".join(calls_of(sequences)))
        assert sample["turns"] == sum(one["turns"] for one in sequences) <= 6
        assert {name.removeprefix("branch:") for name in sample["counts"] if name.startswith("branch:")} <= branches
        for one in sequences:
            assert len(one["token_ids"]) == len(one["loss_mask"])
            assert sum(span["end"] - span["start"] for span in one["version_spans"]) >= sum(one["loss_mask"]) > 0
            assert {span["version"] for span in one["version_spans"]} == {1}
    step = trained.metrics[-1]
    assert step["logprob_gap"] < 1e-4
    assert step["malformed_calls"] == 0
    trained_tokens = sum(sum(one["loss_mask"]) for s in trained.samples for one in s["sequences"])
    assert step["tokens"] == trained_tokens


def calls_of(sequences: Any) -> list[str]:
    """Returns the texts of the model's turns."""
    return [
        turn.split("<|im_end|>")[0] for one in sequences for turn in one["text"].split("<|im_start|>assistant\n")[1:]
    ]


def test_claude_code(tmp_path: Path) -> None:
    bash = call("Bash", command=SOLVE, description="Writes it")
    agent = call("Agent", description="sub", prompt="Write 42 to answer.txt, please.")
    trained = train("claude_code", tmp_path, [bash, agent, "I have done it."])
    check(trained, {"sub_agent", "forked", "compacted"})


def test_codex(tmp_path: Path) -> None:
    trained = train("codex", tmp_path, [call("exec_command", cmd=SOLVE), "I have done it."])
    check(trained, set())


def test_qwen_code(tmp_path: Path) -> None:
    shell = call("run_shell_command", command=SOLVE, description="Writes it", is_background=False)
    trained = train("qwen_code", tmp_path, [shell, "I have done it."])
    check(trained, set())


def test_mini_swe_agent(tmp_path: Path) -> None:
    submit = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
    trained = train("mini_swe_agent", tmp_path, [call("bash", command=SOLVE), call("bash", command=submit)])
    check(trained, set())
