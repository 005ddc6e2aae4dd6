"""Real trials of Harbor, with its own agents, as samples: `make test-harbor`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.agents.player import AgentPlayer, load_agent
from millrace.config.agents import AgentConfig
from millrace.config.models import RolloutConfig, TrainConfig
from millrace.config.sources import TinyModelConfig
from millrace.errors import UserCodeError
from millrace.gateway import serve_gateway
from millrace.integrations.harbor import main, reached_through, reward_of
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.player import PlayedByAgent
from millrace.rollout.sample import EpisodeEnd, Problem
from millrace.train.agents import FOLDER
from millrace.types import SamplingParams
from tests.agents.test_player import Fleet
from tests.gateway.agents.alone import AGENTS, ALONE, NEEDS_AGENTS
from tests.gateway.formats import format_of
from tests.gateway.qwen import call, results, said_in, turn
from tests.integrations.harbor import PYTHON
from tests.integrations.processes import command_lines
from tests.train.test_own_rewards import run, samples, settings

HERE = Path(__file__).parent
TURNS = format_of("qwen3")
LIMITS = EpisodeLimits(8, 400, 50_000, 100_000)
TERMINUS = {"name": "terminus-2", "kwargs": {"record_terminal_session": False, "enable_summarize": False}}
MINI = {"name": "mini-swe-agent", "kwargs": {"skip_install": True}}
TEST = """
mkdir -p /logs/verifier
if grep -q "7" /app/answer.txt; then right=1; else right=0; fi
echo "{\\"reward\\": $right, \\"short\\": 0.5}" > /logs/verifier/reward.json
"""


def task(folder: Path, test: str = TEST, *, timeout: float = 300.0) -> Path:
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
    timeout: float = 400.0,
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
    ("agent", "script", "turns", "gateway"),
    [(TERMINUS, terminus, 3, "unreachable.invalid"), (MINI, mini, 2, "localhost")],
    ids=["terminus-2", "mini-swe-agent"],
)
async def test_a_trial_is_a_sample(
    tmp_path: Path, agent: dict[str, Any], script: Callable[[str], str], turns: int, gateway: str
) -> None:
    """terminus-2 runs in Harbor's process, and mini-swe-agent in the environment, with another way to the gateway."""
    task(tmp_path)
    played = await play(tmp_path, agent_config(tmp_path, agent, "--gateway", gateway), script)
    assert (played.reward, played.parts) == (1.0, {"reward": 1.0, "short": 0.5})
    assert (played.episode.turns, played.branches) == (turns, ())
    assert "Write the number of eggs" in str(played.episode.messages)
    assert "agent_failed" not in played.counts
    assert journal(tmp_path) == ["start", "stopping", "stop"]
    assert not (tmp_path / FOLDER / "sample-0").exists()


@NEEDS_AGENTS
@pytest.mark.parametrize(("name", "branches"), [("claude-code", 0), ("codex", 0), ("opencode", 1), ("qwen-coder", 0)])
def test_an_agent_in_the_environment_finds_the_gateway(tmp_path: Path, name: str, branches: int) -> None:
    """opencode asks for a title, too."""
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.integrations.harbor.cli_agents", name, str(tmp_path)],
        env={**os.environ, "PATH": f"{AGENTS}/node_modules/.bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=400,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [1.0, 2, branches]


async def test_an_agent_that_is_too_late_for_harbor_has_failed_and_keeps_its_reward(tmp_path: Path) -> None:
    task(tmp_path, timeout=15)
    waits = json.dumps(
        {"analysis": "a", "plan": "p", "commands": [{"keystrokes": "echo 7 > answer.txt; sleep 60\n", "duration": 60}]}
    )
    played = await play(tmp_path, agent_config(tmp_path, TERMINUS), lambda _: turn(waits))
    assert (played.reward, played.counts["agent_failed"]) == (1.0, 1)
    assert journal(tmp_path) == ["start", "stopping", "stop"]


@pytest.mark.parametrize(
    ("test", "environment", "says"),
    [
        ("true", {}, "harbor: RewardFileNotFoundError: No reward file found at "),
        (TEST.replace("reward\\", "right\\"), {}, "ValueError: the verifier gave several rewards (right, short)"),
        (TEST, {"broken": True}, "harbor: RuntimeError: no space left on the device"),
    ],
)  # fmt: skip
async def test_what_fails_is_the_last_line(tmp_path: Path, test: str, environment: dict[str, Any], says: str) -> None:
    task(tmp_path, test)
    with pytest.raises(UserCodeError, match="ended with status 1") as raised:
        await play(tmp_path, agent_config(tmp_path, TERMINUS, **environment), terminus)
    assert says in str(raised.value).splitlines()[-1]
    assert journal(tmp_path) == ["start", "stopping", "stop"]
    assert (tmp_path / FOLDER / "sample-0" / "trial").is_dir()


async def test_the_limits_of_the_rollout_end_a_trial(tmp_path: Path) -> None:
    task(tmp_path)
    limits = EpisodeLimits(1, 400, 20_000, 100_000)
    played = await play(tmp_path, agent_config(tmp_path, TERMINUS), terminus, limits=limits)
    assert played.episode.end is EpisodeEnd.TURN_LIMIT
    assert (played.reward, played.counts["agent_failed"]) == (1.0, 1)


@pytest.mark.parametrize("when", ["start", "stopping"])
async def test_a_cancelled_sample_stops_its_environment(tmp_path: Path, when: str) -> None:
    task(tmp_path)
    never = asyncio.Event()

    async def script(prompt: str) -> str:
        if when == "start":
            await never.wait()
        return terminus(prompt)

    config = agent_config(tmp_path, TERMINUS, slow_stop=4)
    playing = asyncio.create_task(play(tmp_path, config, script))
    async with asyncio.timeout(200):
        while not (tmp_path / "journal").exists() or journal(tmp_path)[-1] != when:
            await asyncio.sleep(0.02)
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert journal(tmp_path) == ["start", "stopping", "stop"]
    root = (tmp_path / "journal").read_text().split()[1].removeprefix("/tmp/")
    assert root not in os.listdir("/tmp")
    assert not [one for one in command_lines() if root in one or str(tmp_path) in one]


async def test_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task(tmp_path)
    assert main(["tasks", str(tmp_path / "tasks")]) == 0
    (tmp_path / "tasks.jsonl").write_text(rows := capsys.readouterr().out)
    assert json.loads(rows) == {"task": str(tmp_path / "tasks" / "eggs")}
    changes = {
        "data": {"kind": "file", "path": tmp_path / "tasks.jsonl"},
        "evaluation": {"data": {"kind": "file", "path": tmp_path / "tasks.jsonl"}, "problems": 1},
        "agent": agent_config(tmp_path, TERMINUS),
        "model": TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=8192),
        "rollout": RolloutConfig(
            groups_per_step=1, samples_per_group=2, max_turns=2, max_turn_tokens=8, max_sample_tokens=8000
        ),
        "train": TrainConfig(steps=1, lr=1e-3),
    }
    summary = await run(settings(tmp_path, **changes))
    assert summary.metrics[-1].rewards == {"reward": 0.0, "short": 0.5}
    for sample in samples(tmp_path):
        assert sample["counts"]["requests"] == 2
        assert "Write the number of eggs" in sample["text"]


def test_what_can_not_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"harbor: FileNotFoundError: neither {tmp_path} nor a folder in it has a task.toml\n"
    )


@pytest.mark.parametrize(
    ("gateway", "url"),
    [
        ("172.17.0.1", "http://172.17.0.1:8321/e/secret/v1"),
        ("https://policy.example.org", "https://policy.example.org/e/secret/v1"),
        ("http://proxy:80/gateway/", "http://proxy:80/gateway/e/secret/v1"),
    ],
)
def test_the_way_to_the_gateway(gateway: str, url: str) -> None:
    assert reached_through(gateway, "http://127.0.0.1:8321/e/secret/v1") == url


def test_the_reward_is_the_only_one_or_the_one_of_this_name() -> None:
    assert reward_of({"tests": 1}) == (1.0, {"tests": 1.0})
    assert reward_of({"tests": 1, "reward": 0.5}) == (0.5, {"tests": 1.0, "reward": 0.5})
