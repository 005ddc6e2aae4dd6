"""Episodes of the real library verifiers, in processes of their own, whose harness talks to the gateway."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.config.agents import AgentConfig
from millrace.errors import UserCodeError
from millrace.integrations.verifiers import main
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.player import PlayedByAgent
from millrace.rollout.sample import EpisodeEnd, Problem
from millrace.types import SamplingParams
from tests.agents.test_player import FORMAT, TOKENIZER, Fleet, playing
from tests.integrations.processes import command_lines

HERE = Path(__file__).parent
LIMITS = EpisodeLimits(4, 48, 256, 256)


def environment(folder: Path, **harness: Any) -> Path:
    path = folder / "env.yaml"
    agent = {"harness": {"id": "word-games", **harness}}
    path.write_text(json.dumps({"taskset": {"id": "word-games"}, "agent": agent}))
    return path


async def play(
    folder: Path, turns: Iterator[str], *, limits: EpisodeLimits = LIMITS, task: int = 1, **harness: Any
) -> PlayedByAgent:
    command = [sys.executable, "-m", "millrace.integrations.verifiers", "episode", str(environment(folder, **harness))]
    agent = AgentConfig.model_validate({"command": command, "reward": "file", "environment": {"PYTHONPATH": str(HERE)}})
    fleet = Fleet(TOKENIZER, FORMAT.stop_token_ids[0], lambda _: next(turns))
    async with playing(agent, folder / "agents", fleet) as player:
        problem = Problem("word", (), {"task": task})
        return await player.play("sample-0", problem, sampling=SamplingParams(48), limits=limits, timeout=400.0)


@pytest.mark.parametrize("protocol", ["chat", "responses", "messages"])
async def test_a_harness_is_played_in_its_own_protocol(tmp_path: Path, protocol: str) -> None:
    played = await play(tmp_path, iter(["eggs", "cards"]), protocol=protocol)
    assert played.reward == pytest.approx(0.8)
    assert played.parts == {"right": 1.0, "turns": 2.0}
    assert (played.episode.turns, played.branches, played.counts["requests"]) == (2, (), 2)
    said = [message["content"] for message in played.episode.messages]
    assert said == ["Guess.", "Which word?", "eggs", "No, not eggs.", "cards"]


async def test_a_harness_may_branch(tmp_path: Path) -> None:
    played = await play(tmp_path, iter(["forget", "cards"]))
    assert played.reward == pytest.approx(0.8)
    assert [one.turns for one in (*played.branches, played.episode)] == [1, 1]


async def test_a_limit_ends_an_episode_which_is_scored(tmp_path: Path) -> None:
    played = await play(tmp_path, iter(["eggs"]), limits=EpisodeLimits(1, 48, 256, 256))
    assert played.reward == pytest.approx(-0.1)
    assert played.episode.end is EpisodeEnd.TURN_LIMIT


@pytest.mark.parametrize(
    ("turn", "task", "says"),
    [
        ("raise", 1, "verifiers: TaskError: task WordTask scoring: ValueError: the reward raised"),
        ("die", 1, "verifiers: HarnessError: harness 'word-games' exited 1: the harness died"),
        ("eggs", 9, "verifiers: ValueError: the taskset has no task 9"),
    ],
)
async def test_what_fails_is_the_last_line(tmp_path: Path, turn: str, task: int, says: str) -> None:
    with pytest.raises(UserCodeError) as raised:
        await play(tmp_path, iter([turn]), task=task, tries=1)
    assert says in str(raised.value).splitlines()[-1]


async def test_a_cancelled_episode_leaves_no_process(tmp_path: Path) -> None:
    asked, never = asyncio.Event(), asyncio.Event()

    async def script(_: str) -> str:
        asked.set()
        await never.wait()
        return ""

    command = [sys.executable, "-m", "millrace.integrations.verifiers", "episode", str(environment(tmp_path))]
    agent = AgentConfig.model_validate({"command": command, "reward": "file", "environment": {"PYTHONPATH": str(HERE)}})
    async with playing(agent, tmp_path / "agents", Fleet(TOKENIZER, FORMAT.stop_token_ids[0], script)) as player:
        problem = Problem("word", (), {"task": 0})
        running = asyncio.create_task(
            player.play("sample-0", problem, sampling=SamplingParams(48), limits=LIMITS, timeout=400.0)
        )
        async with asyncio.timeout(200):
            await asked.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not [line for line in command_lines() if str(tmp_path) in line or "which word" in line.lower()]


def test_the_rows_are_the_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    assert main(["tasks", str(environment(tmp_path)), "--limit", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"task": 0, "name": "word-eggs"}, {"task": 1, "name": "word-cards"}]
    (tmp_path / "empty.yaml").write_text("{}")
    assert main(["tasks", str(tmp_path / "empty.yaml")]) == 1
    assert "empty.yaml has no taskset.id, the id of an installed taskset\n" in capsys.readouterr().err
