"""Samples that real commands and functions play through the gateway, on an engine that writes what a script says."""

import asyncio
import json
import os
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.agents.player import AgentPlayer, duplicated, load_agent
from millrace.config.agents import AgentConfig
from millrace.errors import ConfigError, DataError, EngineFailed, UserCodeError
from millrace.gateway import serve_gateway
from millrace.gateway.format import learn_format
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.player import PlayedByAgent
from millrace.rollout.sample import EpisodeEnd, Problem
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import GenerateRequest, Generation, SamplingParams
from tests.gateway.scripted import ScriptedFleet

TOKENIZER = make_tiny_tokenizer()
FORMAT = learn_format(TOKENIZER, "tiny")
LIMITS = EpisodeLimits(4, 48, 256, 256)
PROBLEM = Problem.of_question("row-1", "How many eggs?", "7")
# What every agent below begins with: `ask` sends a conversation and returns the answer's text.
ASK = """
import json, os, sys, time, urllib.request

def ask(*texts, **more):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    body = json.dumps({"model": "any", "messages": messages, **more}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"] or ""
"""


@dataclass
class Fleet(ScriptedFleet):
    interrupted: bool = False
    error: Exception | None = None

    async def generate(self, request: GenerateRequest, **more: Any) -> Generation:
        if self.error is not None:
            raise self.error
        return await super().generate(request, **more)


def fleet() -> Fleet:
    return Fleet(TOKENIZER, FORMAT.stop_token_ids[0], lambda _: "#### 7")


def config(code: str = "", **settings: Any) -> AgentConfig:
    command = [sys.executable, "-c", ASK + textwrap.dedent(code)] if code else None
    return AgentConfig.model_validate({"command": command, **settings}).rewarded(functions=False)


@asynccontextmanager
async def playing(agent: AgentConfig, folder: Path, engines: Fleet | None = None) -> AsyncIterator[AgentPlayer]:
    async with serve_gateway(engines or fleet(), FORMAT, key="key") as gateway:  # type: ignore[arg-type]
        yield AgentPlayer(gateway, load_agent(agent, folder), agent)
        assert not gateway.episodes


async def play(
    agent: AgentConfig,
    folder: Path,
    engines: Fleet | None = None,
    *,
    limits: EpisodeLimits = LIMITS,
    timeout: float = 60.0,
) -> PlayedByAgent:
    async with playing(agent, folder, engines) as player:
        sampling = SamplingParams(limits.max_turn_tokens, temperature=0.5)
        return await player.play("sample-0", PROBLEM, sampling=sampling, limits=limits, timeout=timeout)


@pytest.mark.parametrize(("status", "reward"), [(0, 1.0), (3, 0.0)])
async def test_the_exit_is_the_reward(tmp_path: Path, status: int, reward: float) -> None:
    played = await play(config(f"ask('hello'); sys.exit({status})"), tmp_path)
    assert (played.reward, played.parts) == (reward, {"exit": reward})
    assert played.counts == {"requests": 1} | ({"agent_failed": 1} if status else {})
    assert TOKENIZER.decode(played.episode.token_ids).endswith("assistant\n#### 7<|im_end|>")
    assert played.episode.loss_mask.sum() == len(TOKENIZER.encode("#### 7")) + 1
    assert played.episode.messages[-1]["content"] == "#### 7"


@pytest.mark.parametrize(
    ("written", "reward", "parts"),
    [
        ("0.25", 0.25, {"file": 0.25}),
        ('{"reward": 2, "parts": {"a": 1, "b": 0.5}}', 2.0, {"a": 1.0, "b": 0.5}),
    ],
)
async def test_the_file_is_the_reward(tmp_path: Path, written: str, reward: float, parts: dict[str, float]) -> None:
    played = await play(config(f"ask('hello'); open('reward.json', 'w').write({written!r})", reward="file"), tmp_path)
    assert (played.reward, played.parts) == (reward, parts)


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ("open('reward.json', 'w').write('{\"score\": 1}')", r"reward.json has .*it must be a number, or an object"),
        ("open('reward.json', 'w').write('NaN')", "reward.json can't be read"),
        ("", r"it wrote no reward.json"),
        ("raise ValueError('a bug')", r"ended with status 1; last lines of .*agent.log:\n(.*\n)+  ValueError: a bug"),
    ],
)
async def test_a_sample_without_the_files_reward_fails(tmp_path: Path, ends: str, says: str) -> None:
    with pytest.raises(UserCodeError, match=says):
        await play(config(f"ask('hello')\n{ends}", reward="file"), tmp_path)
    assert (tmp_path / "sample-0" / "agent.log").exists()  # of a sample that failed


async def test_an_agent_that_asks_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="has no answer of the model"):
        await play(config("pass"), tmp_path)
    with pytest.raises(UserCodeError, match="ended with status 1; last lines of .*\n(.*\n)*.*no such thing"):
        await play(config("sys.exit('no such thing')"), tmp_path)


async def test_the_command_has_a_folder_and_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "OPENAI_ORGANIZATION", "SECRET", "WANTED"):
        monkeypatch.setenv(name, "the user's")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "note.txt").write_text("a note")
    code = """
        seen = {"environment": dict(os.environ), "row": json.load(open("row.json")), "cwd": os.getcwd(),
                "note": open("data/note.txt").read()}
        open("seen.json", "w").write(json.dumps(seen))
        ask(os.environ["MILLRACE_PROMPT"])
    """
    agent = config(
        code, keep="all", files=[tmp_path / "data"], pass_environment=["WANTED"], environment={"EXTRA": "a value"}
    )
    played = await play(agent, tmp_path / "agents")
    folder = tmp_path / "agents" / "sample-0"
    seen = json.loads((folder / "seen.json").read_text())
    variables = seen.pop("environment")
    assert seen == {"row": dict(PROBLEM.row), "cwd": str(folder), "note": "a note"}
    assert "TMPDIR" in variables
    assert variables.pop("PATH").split(":")[0] == str(Path(sys.executable).parent)
    assert variables.pop("OPENAI_BASE_URL") == variables.pop("ANTHROPIC_BASE_URL") + "/v1"
    assert variables.pop("OPENAI_API_KEY") == variables.pop("ANTHROPIC_API_KEY")
    assert {name: variables[name] for name in ("HOME", "MILLRACE_PROMPT", "WANTED", "EXTRA")} == {
        "HOME": str(folder), "MILLRACE_PROMPT": PROBLEM.question, "WANTED": "the user's", "EXTRA": "a value",
    }  # fmt: skip
    assert variables.keys() - {"LC_CTYPE"} == {
        "HOME", "LANG", "MILLRACE_PROMPT", "WANTED", "EXTRA", "OPENAI_API_BASE", "TMPDIR",
    }  # fmt: skip
    assert played.episode.messages[0]["content"] == PROBLEM.question


@pytest.mark.parametrize(("keep", "left"), [("all", {"good", "bad"}), ("failed", {"bad"}), ("none", set())])
async def test_the_folders_that_are_kept(tmp_path: Path, keep: str, left: set[str]) -> None:
    agent = config("ask('hello') if 'good' in os.getcwd() else None", keep=keep)
    limits, sampling = EpisodeLimits(4, 48, 256, 256), SamplingParams(48)
    async with playing(agent, tmp_path) as player:
        await player.play("good", PROBLEM, sampling=sampling, limits=limits, timeout=60)
        with pytest.raises(UserCodeError):
            await player.play("bad", PROBLEM, sampling=sampling, limits=limits, timeout=60)
    assert set(os.listdir(tmp_path)) == left


async def test_the_folder_of_a_failed_agent_is_kept_if_its_sample_has_a_reward(tmp_path: Path) -> None:
    played = await play(config("ask('hello'); sys.exit(3)", keep="failed"), tmp_path)
    assert (played.reward, played.counts["agent_failed"]) == (0.0, 1)
    [folder] = os.listdir(tmp_path)
    assert "agent.log" in os.listdir(tmp_path / folder)


async def test_the_agents_own_timeout_is_its_failure_and_the_samples_is_not(tmp_path: Path) -> None:
    code = "ask('hello'); time.sleep(600)"
    for reward in ("exit", "file"):
        played = await play(config(code, timeout=3.0, reward=reward), tmp_path)
        assert (played.reward, played.parts) == (0.0, {reward: 0.0})
        assert played.counts["agent_failed"] == 1
    with pytest.raises(TimeoutError):
        await play(config(code, timeout=3.0), tmp_path, timeout=2.0)


async def test_the_seconds_in_which_the_fleet_is_interrupted_do_not_count(tmp_path: Path) -> None:
    engines = fleet()
    engines.interrupted = True
    played = await play(config("ask('hello'); time.sleep(2)"), tmp_path, engines, timeout=1.0)
    assert played.reward == 1.0


async def test_the_limits_of_the_rollout_end_an_agent(tmp_path: Path) -> None:
    loop = """
        said = ["hello"]
        while True:
            said += [ask(*said), "go on"]
    """
    by_turns = await play(config(loop, reward="file"), tmp_path, limits=EpisodeLimits(3, 48, 256, 256))
    assert (by_turns.reward, by_turns.episode.end, by_turns.episode.turns) == (0.0, EpisodeEnd.TURN_LIMIT, 3)
    by_tokens = await play(config(loop), tmp_path, limits=EpisodeLimits(99, 48, 60, 256))
    assert (by_tokens.reward, by_tokens.episode.end) == (0.0, EpisodeEnd.TOKEN_LIMIT)
    assert 40 < len(by_tokens.episode.token_ids) <= 60
    by_turn_tokens = await play(config("ask('hello')"), tmp_path, limits=EpisodeLimits(9, 2, 256, 256))
    assert by_turn_tokens.episode.loss_mask.sum() == 2


async def test_the_rollouts_sampling_is_every_requests(tmp_path: Path) -> None:
    engines = fleet()
    code = "ask('hello', temperature=0.9, seed=1, frequency_penalty=0.5, top_p=1, stop=['x'], max_tokens=9)"
    played = await play(config(code), tmp_path, engines)
    assert (
        played.counts.items() >= {"dropped:temperature": 1, "dropped:seed": 1, "dropped:frequency_penalty": 1}.items()
    )
    sampling = engines.asked[0].request.sampling
    assert sampling == SamplingParams(9, temperature=0.5, stop=("x",), stop_token_ids=FORMAT.stop_token_ids)


async def test_an_engines_failure_is_not_the_agents(tmp_path: Path) -> None:
    engines = fleet()
    engines.error = EngineFailed("engine-0", "it broke")
    code = """
        try:
            ask("hello")
        except Exception:
            pass
    """
    with pytest.raises(EngineFailed, match="it broke"):
        await play(config(code), tmp_path, engines)


async def test_a_request_that_is_answered_later_is_no_failure(tmp_path: Path) -> None:
    engines = fleet()
    engines.error = EngineFailed("engine-0", "it broke")
    (tmp_path / "again.py").write_text("async def again(base_url, api_key):\n    return await ASK(base_url, api_key)\n")
    tries: list[int] = []

    async def ask(base_url: str, api_key: str) -> float:
        import aiohttp

        body = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}) as session:
            for _ in range(2):
                async with session.post(f"{base_url}/v1/chat/completions", json=body) as response:
                    tries.append(response.status)
                engines.error = None
        return 0.5

    agent = config(path=str(tmp_path / "again.py"), name="again")
    async with playing(agent, tmp_path, engines) as player:
        sys.modules[player.agent.function.__module__].ASK = ask  # type: ignore[attr-defined]
        limits = EpisodeLimits(4, 48, 256, 256)
        played = await player.play("sample", PROBLEM, sampling=SamplingParams(48), limits=limits, timeout=60)
    assert tries == [500, 200]
    assert (played.reward, played.parts) == (0.5, {"return": 0.5})


async def test_branches_are_sequences_of_the_sample_in_which_each_token_is_trained_once(tmp_path: Path) -> None:
    code = """
        first = ask("hello")
        for text in ("one", "two", "three"):
            ask("hello", first, text)
        ask("something else")
    """
    played = await play(config(code), tmp_path, limits=EpisodeLimits(9, 48, 256, 256))
    sequences = (*played.branches, played.episode)
    assert len(sequences) == 4
    turn = len(TOKENIZER.encode("#### 7")) + 1
    assert [int(one.loss_mask.sum()) for one in sequences] == [2 * turn, turn, turn, turn]
    assert TOKENIZER.decode(played.episode.token_ids).startswith("<|im_start|>user\nsomething else")
    assert played.counts["requests"] == 5
    assert played.counts["branch:forked"] == 2
    assert played.counts["branch:other_conversation"] == 1
    beginning = len(TOKENIZER.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")) + turn
    assert played.counts["duplicated_tokens"] >= 2 * beginning


async def test_an_answer_that_the_agent_asked_for_again_and_did_not_use_is_left_out(tmp_path: Path) -> None:
    code = """
        first = ask("hello")
        ask("hello", first, "one")
        again = ask("hello", first, "one")
        ask("hello", first, "one", again, "two")
    """
    engines, number = fleet(), iter(range(9))
    engines.script = lambda _: f"#### {next(number)}"
    played = await play(config(code), tmp_path, engines)
    assert played.branches == ()
    assert [int(one.split("<")[0]) for one in TOKENIZER.decode(played.episode.token_ids).split("#### ")[1:]] == [
        0,
        2,
        3,
    ]
    assert played.episode.loss_mask.sum() == 3 * (len(TOKENIZER.encode("#### 7")) + 1)


def test_duplicated_tokens_are_those_outside_of_the_prefix_tree() -> None:
    assert duplicated([(1, 2, 3), (1, 2, 4), (5,), (1, 2, 4, 6)]) == 2 + 3
    assert duplicated([(1, 2)]) == 0


async def test_at_most_so_many_agents_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("async def slow(base_url):\n    await RUN()\n    return 1.0\n")
    agent = config(path=str(tmp_path / "slow.py"), name="slow", concurrency=2)
    running, most, go = 0, 0, asyncio.Event()

    async def run() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1

    async with playing(agent, tmp_path) as player:
        sys.modules[player.agent.function.__module__].RUN = run  # type: ignore[attr-defined]
        limits, sampling = EpisodeLimits(4, 48, 256, 256), SamplingParams(48)
        plays = [player.play(str(i), PROBLEM, sampling=sampling, limits=limits, timeout=60) for i in range(5)]
        tasks = [asyncio.ensure_future(one) for one in plays]
        while running < 2:
            await asyncio.sleep(0)
        go.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 2
    assert all(isinstance(one, UserCodeError) for one in ended)  # none has asked the model


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def agent(prompt):\n    raise ValueError('a bug')", r"agent.py:agent failed: ValueError: a bug"),
        ("async def agent(row):\n    return 'much'", r"returned 'much' for row row-1; it must return the reward"),
        ("def agent(api_key):\n    return None", r"returned None for row row-1"),
    ],
)
async def test_a_function_without_a_reward_fails(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "agent.py").write_text(code)
    with pytest.raises(UserCodeError, match=says):
        await play(config(path=str(tmp_path / "agent.py"), name="agent"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"command": ["no-such-program"]}, "agent.command: there is no program 'no-such-program' on the PATH"),
        ({"command": ["python"], "files": ["missing.txt"]}, "agent.files: missing.txt is neither beside the config"),
        ({"command": ["python"], "pass_environment": ["NOT_SET"]}, "agent.pass_environment: .* has no NOT_SET"),
        ({"path": "missing.py", "name": "agent"}, "agent: missing.py: there is no such file"),
        ({"path": "json", "name": "loads"}, "agent: json:loads requires the parameter 's', which is not offered"),
        ({"path": "json", "name": "JSONDecoder"}, "agent: json:JSONDecoder is no function"),
        ({"command": ["python"], "runner": "json:JSONDecoder"}, "agent.runner: .* which has no method run"),
    ],
)
def test_an_agent_that_can_not_be_used_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_agent(AgentConfig.model_validate(settings), tmp_path)


async def test_commands_can_run_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text("""
import subprocess, asyncio
class Container:
    async def run(self, command):
        run = lambda: subprocess.run(command.command, cwd=command.folder, env=dict(command.environment)).returncode
        (command.folder.parent / "ran").write_text(command.name)
        return await asyncio.to_thread(run)
""")
    agent = config("ask('hello')", runner=f"{tmp_path}/runner.py:Container")
    assert (await play(agent, tmp_path)).reward == 1.0
    assert (tmp_path / "ran").read_text() == "sample-0"


async def test_a_folder_that_can_not_be_made_is_the_samples_failure(tmp_path: Path) -> None:
    (tmp_path / "agents").write_text("a file")
    with pytest.raises(DataError, match="the agent's folder .* can't be made"):
        await play(config("ask('hello')"), tmp_path / "agents")
