"""A runner of the user: commands run in a namespace of processes, and all of them end when the agent does."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from millrace.agents.command import load_command
from millrace.config.agents import AgentConfig
from millrace.errors import ConfigError
from millrace.rollout.sample import EpisodeEnd
from millrace.types import SamplingParams
from tests.agents.test_player import ASK, LIMITS, PROBLEM, playing
from tests.engines.processes import command_lines, processes
from tests.launch.test_process import STUBBORN_TREE

UNSHARE = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
RUNNER = f"""
import asyncio

class Namespaces:
    async def run(self, command):
        with open(command.log, "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *{UNSHARE!r}, *command.command, cwd=command.folder, env=command.environment,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()  # unshare takes the whole namespace with it
                await process.wait()
        return status if status >= 0 else 128 - status

def nothing():
    return object()
"""
pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="this user may not make namespaces (unshare)",
)
WAIT = 60.0  # seconds for any single thing to happen


def config(folder: Path, code: str, **settings: object) -> AgentConfig:
    (folder / "runner.py").write_text(RUNNER)
    command, runner = [sys.executable, "-c", ASK + code], {"path": str(folder / "runner.py"), "name": "Namespaces"}
    given = {"command": command, "runner": runner, **settings}
    return AgentConfig.model_validate(given).rewarded(functions=False)


def named(marker: str) -> set[int]:
    """The processes with this text in their command line."""
    found = set()
    for pid in processes():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if marker in command_lines({pid}):
                found.add(pid)
    return found


async def until(condition: object) -> None:
    end = time.monotonic() + WAIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_a_command_runs_where_the_runner_says(tmp_path: Path) -> None:
    code = 'ask("hello"); json.dump({"reward": os.getpid()}, open("reward.json", "w")); print("written")'
    agent = config(tmp_path, code, reward="file", keep="all")
    async with playing(agent, tmp_path / "agents") as player:
        played = await player.play("sample-0", PROBLEM, sampling=SamplingParams(48), limits=LIMITS, timeout=WAIT)
    assert played.reward == 1.0  # the first process of its namespace
    assert played.episode.end == EpisodeEnd.ANSWERED
    assert (tmp_path / "agents" / "sample-0" / "agent.log").read_text() == "written\n"


async def test_all_processes_end_with_the_agent(tmp_path: Path) -> None:
    """The tree ignores SIGTERM, and each of its processes has left the session of the one before."""
    script = tmp_path / "tree.py"
    script.write_text(STUBBORN_TREE)
    code = f"ask('hello'); os.execv(sys.executable, [sys.executable, {str(script)!r}, '2', 'pids'])"
    async with playing(config(tmp_path, code), tmp_path / "agents") as player:
        playing_it = asyncio.create_task(
            player.play("sample-0", PROBLEM, sampling=SamplingParams(48), limits=LIMITS, timeout=WAIT)
        )
        pids = tmp_path / "agents" / "sample-0" / "pids"
        await until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        assert len(named(str(script))) >= 3
        playing_it.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing_it
    await until(lambda: not named(str(script)))


def test_what_is_no_runner_is_refused(tmp_path: Path) -> None:
    agent = config(tmp_path, "pass")
    assert agent.runner is not None
    agent = agent.model_copy(update={"runner": agent.runner.model_copy(update={"name": "nothing"})})
    with pytest.raises(ConfigError, match=r"agent.runner: .*nothing made .*, which has no method run\(command\)"):
        load_command(agent, tmp_path)
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"runner.py"}
