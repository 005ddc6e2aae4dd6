"""Whole runs with agents: real processes, a real gateway and a real engine. And what is trained of their branches."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from millrace.cli import app
from millrace.config import RunConfig, dump_config
from millrace.config.models import LossConfig
from millrace.errors import RolloutError
from millrace.rollout.sample import Episode, EpisodeEnd, Group, Problem, Sample, SampleStatus
from millrace.rollout.staleness import staleness
from millrace.train.batch import TrainSample, collate, sequences_of
from millrace.train.loss import masked_average
from millrace.types import VersionSpan
from tests.agents.test_player import ASK
from tests.train.test_own_rewards import run, samples, settings

GENERATED = {"kind": "generated", "seed": 1, "problems": 2}
LOOP = """
asked = ["Say anything."]
asked += [ask(*asked), "And now?"]
ask(*asked)
"""
FUNCTIONS = """
import json, urllib.request, asyncio

def agent(row, prompt, base_url, api_key):
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"x-api-key": api_key, "Content-Type": "application/json"}
    request = urllib.request.Request(base_url + "/chat/completions", body, headers)
    said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"] or ""
    return (len(said) + len(row["thing"])) / 100

def length(conversation, answer):
    assert conversation[-1]["content"] == answer and conversation[0]["role"] == "user"
    return len(answer) / 100
"""


def agent_settings(folder: Path, agent: dict[str, Any], *reward: Any, **changes: Any) -> RunConfig:
    rollout = {
        "groups_per_step": 2, "samples_per_group": 4, "max_turns": 4, "max_turn_tokens": 8, "max_sample_tokens": 160,
    }  # fmt: skip
    return settings(folder, *reward, rollout=rollout, agent=agent, **changes)


def command(folder: Path, code: str, **more: Any) -> dict[str, Any]:
    (folder / "agent.py").write_text(ASK + code)
    return {"command": [sys.executable, str(folder / "agent.py")], **more}


async def test_commands_are_trained_by_what_they_write(tmp_path: Path) -> None:
    code = LOOP + 'json.dump({"reward": len(asked[1]) / 100, "parts": {"half": 0.5}}, open("reward.json", "w"))'
    summary = await run(agent_settings(tmp_path, command(tmp_path, code, reward="file")))
    assert summary.counts.ended[SampleStatus.FINISHED] == 16
    assert [step.weight_version for step in summary.metrics] == [1, 2, 3]
    step = summary.metrics[-1]
    assert (step.rewards, step.branches, step.requests, step.agents_failed) == ({"half": 0.5}, 1.0, 16, 0)
    assert step.logprob_gap is not None
    assert step.logprob_gap < 1e-4
    for sample in samples(tmp_path):
        assert sample["turns"] == 2
        [sequence] = sample["sequences"]
        assert sequence["text"].count("<|im_start|>assistant\n") == 2
        assert sequence["text"].startswith("<|im_start|>user\nSay anything.")
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * 2
        assert {"queue", "generate", "tools", "agent_queue"} <= sample["timings"].keys()
        assert sum(sample["timings"].values()) <= sample["seconds"]
        assert sample["counts"] == {"requests": 2}
    assert list((tmp_path / "run" / "agents").iterdir()) == []


async def test_branches_are_trained_with_the_reward_of_their_sample(tmp_path: Path) -> None:
    code = LOOP + 'ask("Another one."); sys.exit(len(asked[1]) % 2)'
    summary = await run(agent_settings(tmp_path, command(tmp_path, code)))
    written = samples(tmp_path)
    assert {sample["reward"] for sample in written} <= {0.0, 1.0}
    assert all(sample["reward"] == sample["rewards"]["exit"] for sample in written)
    for sample in written:
        assert [one["turns"] for one in sample["sequences"]] == [2, 1]
        assert sample["sequences"][-1]["text"].startswith("<|im_start|>user\nAnother one.")
    steps = summary.metrics[1:]
    assert [step.branches for step in steps] == [2.0, 2.0]
    masks = [one["loss_mask"] for sample in written for one in sample["sequences"]]
    assert sum(step.tokens for step in steps) == sum(sum(mask) for mask in masks)
    assert sum(step.agents_failed for step in steps) == sum(sample["reward"] == 0 for sample in written)
    assert all(step.logprob_gap is not None and step.logprob_gap < 1e-4 for step in steps)


@pytest.mark.parametrize("graded", [False, True])
async def test_functions_are_trained_by_what_they_return_or_by_reward_functions(tmp_path: Path, graded: bool) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    config = agent_settings(tmp_path, {"path": str(tmp_path / "functions.py"), "name": "agent"})
    if graded:
        reward = {"path": str(tmp_path / "functions.py"), "name": "length"}
        config = RunConfig.model_validate({**config.model_dump(), "reward": reward})
    summary = await run(config)
    assert summary.counts.ended[SampleStatus.FINISHED] == 16
    assert summary.metrics[-1].rewards.keys() == {"length" if graded else "return"}
    assert all(sample["turns"] == 1 for sample in samples(tmp_path))
    assert all("Write about" in sample["sequences"][0]["text"] for sample in samples(tmp_path))


async def test_turns_have_no_limit_unless_one_is_set(tmp_path: Path) -> None:
    config = agent_settings(tmp_path, command(tmp_path, "[ask(str(i)) for i in range(6)]"))
    given = config.model_dump()
    del given["rollout"]["max_turns"]
    free = RunConfig.model_validate(given)
    assert (config.max_turns, free.max_turns) == (4, None)
    assert settings(tmp_path, rollout=free.rollout).max_turns == 4
    summary = await run(free)
    assert summary.metrics[-1].requests == 6 * 8
    assert all(sample["counts"] == {"duplicated_tokens": sample["counts"]["duplicated_tokens"], "requests": 6,
                                    "branch:other_conversation": 5} for sample in samples(tmp_path))  # fmt: skip


async def test_a_run_whose_agents_all_crash_ends_with_the_reason(tmp_path: Path) -> None:
    agent = command(tmp_path, 'raise ValueError("a bug")')
    with pytest.raises(
        RolloutError, match=r"all 4 samples of the evaluation failed: the agent .*agent.py failed: it"
    ) as e:
        await run(agent_settings(tmp_path, agent))
    assert "ValueError: a bug" in str(e.value)
    assert len(list((tmp_path / "run" / "agents").iterdir())) == 4


async def test_the_warm_up_teaches_the_calculator(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    agent = {"path": str(tmp_path / "functions.py"), "name": "agent"}
    summary = await run(agent_settings(tmp_path, agent, warmup={"steps": 2, "lr": 1e-3, "batch_size": 4}))
    assert len(summary.metrics) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"environment": {"openenv": "http://127.0.0.1:1"}, "data.prompt": None, "evaluation.data": GENERATED},
         "environment can't be set together with"),
        ({"judges": {"model": {"kind": "tiny"}, "engine": {"kind": "embedded"}}}, "judges can't be set together with"),
        ({"rollout.tools": ["calculator"]}, "rollout.tools can't be set together with agent: the agent has its own"),
        ({"rollout.partial_rollouts": False}, "rollout.partial_rollouts can't be set together with agent"),
        ({"gateway": {"temperature": 1.0}}, "gateway.temperature can't be set together with agent: rollout.temperat"),
        ({"gateway": {"folder": "x"}}, "gateway.folder can't be set together with agent"),
        ({"agent": None, "gateway": {}}, "gateway is for an agent, and there is none"),
        ({"agent": {"command": ["a"], "path": "b.py", "name": "c"}}, "an agent has either a command, or path and name"),
        ({"agent": {"command": ["a"], "timeout": 301}}, "rollout.sample_timeout ends a sample after 300 s; raise it"),
        ({"agent": {"command": "python agent.py"}}, "a command is a list of its words, such as [python, agent.py]"),
        ({"agent": {"command": ["a"], "reward": "return"}}, "the reward of this agent can't be 'return'"),
        ({"agent": {"path": "a.py", "name": "b", "files": ["c"]}}, "files is for an agent with a command"),
        ({"agent": {"command": ["a"], "environment": {"HOME": "/"}}}, "HOME is set by Millrace"),
        ({"agent": {"command": ["a"], "reward": "exit"}, "reward": "x.py:y"}, "agent.reward is exit, so `reward:` has"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = agent_settings(tmp_path, {"command": ["true"]}).model_dump()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (given[section] if section else given)[key or name] = value
    with pytest.raises(ValueError, match=re.escape(says)):
        RunConfig.model_validate(given)


def dry_run(config: RunConfig, folder: Path) -> tuple[int, str]:
    (folder / "run.yaml").write_text(dump_config(config))
    result = CliRunner().invoke(app, ["train", str(folder / "run.yaml"), "--dry-run"])
    return result.exit_code, f"{result.output}{result.exception or ''}"


def test_the_dry_run_looks_at_the_agent(tmp_path: Path) -> None:
    status, output = dry_run(agent_settings(tmp_path, command(tmp_path, LOOP)), tmp_path)
    assert status == 0
    assert "# data: 4 problems; the agent makes the prompts" in output
    assert f"# agent: {sys.executable} {tmp_path}/agent.py, 64 at once\n# reward: exit\n" in output
    assert not (tmp_path / "run").exists()
    status, output = dry_run(agent_settings(tmp_path, {"command": ["no-such-program"]}), tmp_path)
    assert status == 1
    assert "agent.command: there is no program 'no-such-program' on the PATH" in output


def episode(tokens: int, trained: int, version: int = 1) -> Episode:
    mask = np.arange(tokens) >= tokens - trained
    spans = (VersionSpan(version, tokens - trained, tokens),)
    return Episode((5,) * tokens, mask, np.zeros(tokens, np.float32), spans, 1, EpisodeEnd.ANSWERED)


def sample(reward: float, *sequences: Episode) -> Sample:
    *branches, last = sequences
    problem = Problem.of_question("p", "q", "1")
    return Sample("s", "g", problem, SampleStatus.FINISHED, last, reward, branches=tuple(branches))


def test_a_sample_counts_once_in_the_baseline_however_many_branches_it_has() -> None:
    many, one = sample(1.0, *[episode(4, 2) for _ in range(5)]), sample(0.0, episode(4, 2))
    made = sequences_of(Group("g", many.problem, (many, one)), normalize=False)
    assert [one.advantage for one in made] == [0.5] * 5 + [-0.5]
    alone = sequences_of(Group("g", many.problem, (sample(1.0, episode(4, 2)), one)), normalize=True)
    assert {one.advantage for one in alone} == {1.0, -1.0}


def test_staleness_and_tokens_are_of_all_sequences() -> None:
    branched = sample(1.0, episode(4, 2, version=3), episode(9, 1, version=7))
    assert branched.oldest_version == 3
    assert branched.generated_tokens == 3
    assert staleness(Group("g", branched.problem, (branched,)), 8) == 5


def test_the_average_over_sequences_is_one_over_samples() -> None:
    """A sample of two sequences weighs as much as one with all of its tokens in one sequence."""
    whole, parts = sample(0.0, episode(9, 4)), sample(1.0, episode(5, 3), episode(3, 1))
    made = sequences_of(Group("g", whole.problem, (whole, parts)), normalize=False)
    assert [one.share for one in made] == [1.0, 0.75, 0.25]
    batch = collate(made)
    values = torch.where(batch.mask_BT, torch.tensor([[2.0], [4.0], [8.0]]), 0.0)
    normalizer = sum(one.share for one in made)
    average = masked_average(values, batch.mask_BT, "sequence", normalizer, batch.tokens_B)
    assert average.item() == pytest.approx((2.0 + (3 * 4.0 + 8.0) / 4) / 2)


def test_without_branches_the_average_is_what_it_was() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 6)
    made = [
        TrainSample(np.ones(n, np.int64), np.arange(n) > n // 3, rng.normal(size=n).astype(np.float32), 0.1)
        for n in lengths
    ]
    batch, values = collate(made), torch.randn(6, int(lengths.max()))
    before = masked_average(values, batch.mask_BT, "sequence", 6)
    assert torch.equal(
        masked_average(values, batch.mask_BT, "sequence", sum(s.share for s in made), batch.tokens_B), before
    )
    assert LossConfig().average == "token"
