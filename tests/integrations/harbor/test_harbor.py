"""Real trials of Harbor, with its own agents, as samples: `make test-harbor`."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.agents.player import AgentPlayer, load_agent
from millrace.config.agents import AgentConfig
from millrace.errors import UserCodeError
from millrace.gateway import serve_gateway
from millrace.integrations.harbor import main, reached_through, reward_of
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.player import PlayedByAgent
from millrace.rollout.sample import EpisodeEnd, Problem
from millrace.train.agents import FOLDER
from millrace.types import SamplingParams
from tests.agents.test_player import Fleet
from tests.gateway.formats import format_of
from tests.gateway.qwen import call, results, said_in, turn
from tests.integrations.harbor import PYTHON
from tests.train.test_own_rewards import run, samples, settings

HERE = Path(__file__).parent
TURNS = format_of("qwen3")
LIMITS = EpisodeLimits(8, 400, 20_000, 100_000)
TERMINUS = {"name": "terminus-2", "kwargs": {"record_terminal_session": False}}
MINI = {"name": "mini-swe-agent", "kwargs": {"skip_install": True}}
TEST = """
mkdir -p /logs/verifier
if grep -q "7" /app/answer.txt; then right=1; else right=0; fi
echo "{\\"reward\\": $right, \\"short\\": 0.5}" > /logs/verifier/reward.json
"""


def task(folder: Path, test: str = TEST, *, timeout: float = 60.0) -> Path:
    """A task of Harbor."""
    made = folder / "tasks" / "eggs"
    for name, text in {
        "instruction.md": "Write the number of eggs, which is 7, to /app/answer.txt.",
        "task.toml": f"[agent]\ntimeout_sec = {timeout}\n[environment]\nworkdir = '/app'\n",
        "environment/Dockerfile": "FROM debian\n",
        "tests/test.sh": f"#!/bin/bash\n{test}",
    }.items():
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return made


def agent_config(folder: Path, agent: dict[str, Any], *options: str, **environment: Any) -> AgentConfig:
    """The settings of a run's agent: a trial in a local environment that keeps a journal."""
    kwargs = {"journal": str(folder / "journal"), **environment}
    trial = {"agent": agent, "environment": {"import_path": "local_environment:LocalEnvironment", "kwargs": kwargs}}
    (folder / "trial.yaml").write_text(json.dumps(trial))
    return AgentConfig.model_validate(
        {
            "command": [
                str(PYTHON),
                "-m",
                "millrace.integrations.harbor",
                "trial",
                str(folder / "trial.yaml"),
                *options,
            ],
            "reward": "file",
            "environment": {"PYTHONPATH": str(HERE.parents[2] / "src")},
            "files": [HERE / "local_environment.py"],
            "grace": 30,
        }
    )


async def play(
    folder: Path,
    config: AgentConfig,
    script: Callable[[str], Any],
    *,
    limits: EpisodeLimits = LIMITS,
    timeout: float = 120.0,
) -> PlayedByAgent:
    fleet = Fleet(TURNS.chat.tokenizer, TURNS.stop_token_ids[0], script)
    problem = Problem("eggs", (), {"task": str(folder / "tasks" / "eggs")})
    async with serve_gateway(fleet, TURNS, key="key") as gateway:  # type: ignore[arg-type]
        player = AgentPlayer(gateway, load_agent(config, folder / FOLDER), config)
        sampling = SamplingParams(limits.max_turn_tokens)
        return await player.play("sample-0", problem, sampling=sampling, limits=limits, timeout=timeout)


def journal(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "journal").read_text().splitlines()]


def commands(*keystrokes: str, done: bool = False) -> str:
    """A turn of the model as terminus-2 reads it."""
    typed = [{"keystrokes": f"{one}\n", "duration": 0.1} for one in keystrokes]
    return turn(json.dumps({"analysis": "a", "plan": "p", "commands": typed, "task_complete": done}))


def terminus(prompt: str) -> str:
    """Writes the file, and says twice that this is all."""
    match len([one for one in said_in(prompt) if one.role == "assistant"]):
        case 0:
            return commands("echo 7 > answer.txt")
    return commands(done=True)


def mini(prompt: str) -> str:
    """The same for mini-swe-agent, in calls of its tool."""
    match results(said_in(prompt)):
        case 0:
            return turn("I write it.", call("bash", command="echo 7 > answer.txt"))
    return turn("Done.", call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"))


@pytest.mark.parametrize(
    ("agent", "script", "turns"), [(TERMINUS, terminus, 3), (MINI, mini, 2)], ids=["terminus-2", "mini-swe-agent"]
)
async def test_a_trial_is_a_sample(
    tmp_path: Path, agent: dict[str, Any], script: Callable[[str], str], turns: int
) -> None:
    task(tmp_path)
    played = await play(tmp_path, agent_config(tmp_path, agent), script)
    assert (played.reward, played.parts) == (1.0, {"reward": 1.0, "short": 0.5})
    assert (played.episode.turns, played.branches) == (turns, ())
    assert "Write the number of eggs" in str(played.episode.messages)
    assert "agent_failed" not in played.counts
    assert journal(tmp_path) == ["start", "stop"]
