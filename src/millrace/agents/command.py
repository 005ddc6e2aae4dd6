"""Agents that are commands: each sample runs one, in a folder and with an environment of its own."""

import asyncio
import base64
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from millrace.agents.base import AgentCommand, AgentRunner
from millrace.agents.job import Ended, Job
from millrace.agents.local import LocalRunner
from millrace.arguments import shown
from millrace.config.agents import AgentConfig
from millrace.errors import ConfigError, DataError, UserCodeError
from millrace.launch.process import tail_of
from millrace.rollout.user_code import load_code, place, said

ROW, LOG, REWARD = "row.json", "agent.log", "reward.json"
LONGEST_PROMPT = 100_000  # bytes of an environment variable; Linux takes 131,072
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class CommandAgent:
    """A command of the user.

    config: its settings. environment: the variables that all samples share. folder: in which each sample has a folder.
    """

    config: AgentConfig
    environment: Mapping[str, str]
    runner: AgentRunner
    folder: Path

    @property
    def where(self) -> str:
        """The command, for messages."""
        return self.config.title

    async def run(self, job: Job) -> Ended:
        """Run the command in a new folder. Raises LaunchError if it can't be started."""
        folder = await asyncio.to_thread(self._made, job)
        assert self.config.command is not None
        command = AgentCommand(
            job.sample_id,
            self.config.command,
            folder,
            self._environment(job, folder),
            folder / LOG,
            self.config.limits.memory,
            self.config.limits.processes,
            self.config.grace,
        )
        status = await self.runner.run(command)
        return Ended() if status == 0 else Ended(f"it ended with status {status}; {self._log(job)}")

    def result(self, job: Job, ended: Ended) -> Ended:
        """Return the end with the reward that the settings ask for. Raises UserCodeError if the file can't be read."""
        match self.config.reward:
            case "exit":
                reward = 0.0 if ended.failure else 1.0
                return Ended(ended.failure, reward, {"exit": reward})
            case "file":
                reward_of = self._folder(job) / REWARD
                if not reward_of.exists():
                    missing = None if ended.failure else f"it wrote no {REWARD}; {self._log(job)}"
                    return Ended(ended.failure or missing)
                return Ended(ended.failure, *read_reward(reward_of))
        return ended

    async def clean(self, job: Job, *, failed: bool) -> None:
        """Remove the sample's folder, unless the settings keep it."""
        if self.config.keep == "none" or (self.config.keep == "failed" and not failed):
            await asyncio.to_thread(shutil.rmtree, self._folder(job), ignore_errors=True)

    def _folder(self, job: Job) -> Path:
        return self.folder / job.sample_id

    def _log(self, job: Job) -> str:
        log = self._folder(job) / LOG
        return tail_of(log) if log.exists() else "it has no log"

    def _made(self, job: Job) -> Path:
        """Make the sample's folder. Raises DataError if it can't be written."""
        folder = self._folder(job)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a sample with this id before the run was resumed
            folder.mkdir(parents=True, mode=0o700)
            for file in self.config.files:
                if file.is_dir():
                    shutil.copytree(file, folder / file.name, symlinks=True)
                else:
                    shutil.copy2(file, folder / file.name)
            (folder / ROW).write_bytes(row_as_json(job.problem.row))
        except OSError as error:
            raise DataError(f"the agent's folder {folder} can't be made: {error}") from error
        return folder

    def _environment(self, job: Job, folder: Path) -> dict[str, str]:
        prompt = job.problem.question
        fits = prompt and len(prompt.encode()) <= LONGEST_PROMPT and "\0" not in prompt
        asked = {"MILLRACE_PROMPT": prompt} if fits else {}
        return {**self.environment, "HOME": str(folder), **asked, **job.episode.environment}


def load_command(config: AgentConfig, folder: Path) -> CommandAgent:
    """Return the agent of the settings. Raises ConfigError if its command, a file or a variable is missing."""
    assert config.command is not None
    for file in config.files:
        if not file.exists():
            raise ConfigError(f"agent.files: {file} is neither beside the config nor in the current folder")
    environment = clean_environment(config)
    runner: AgentRunner = LocalRunner()
    if config.runner is not None:
        runner = _own_runner(config)
    elif shutil.which(config.command[0], path=environment["PATH"]) is None:
        raise ConfigError(f"agent.command: there is no program {config.command[0]!r} on the PATH")
    return CommandAgent(config, environment, runner, folder.absolute())


def clean_environment(config: AgentConfig) -> dict[str, str]:
    """Return the variables that the command gets in every sample. Raises ConfigError if one to pass on is not set."""
    passed = {}
    for name in config.pass_environment:
        if (value := os.environ.get(name)) is None:
            raise ConfigError(f"agent.pass_environment: the trainer's environment has no {name}")
        passed[name] = value
    # The trainer's own interpreter comes first, so that `python` has the packages beside it.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", DEFAULT_PATH)))
    return {"PATH": path, "LANG": os.environ.get("LANG", "C.UTF-8"), **passed, **config.environment}


def read_reward(path: Path) -> tuple[float, dict[str, float]]:
    """Return the reward and its parts: a number, or an object with `reward` and, if it likes, `parts`.

    Raises UserCodeError if the file has something else.
    """
    try:
        value: Any = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserCodeError(f"the agent's {path} can't be read: {error}") from error
    reward: Any = value
    parts: Any = {}
    if isinstance(value, dict):
        reward, parts = value.get("reward"), value.get("parts") or {}
    if not _is_number(reward) or not isinstance(parts, dict) or not all(_is_number(part) for part in parts.values()):
        raise UserCodeError(
            f"the agent's {path} has {shown(value)}; it must be a number, or an object with the number `reward` and "
            "numbers in `parts`"
        )
    return float(reward), {name: float(part) for name, part in parts.items()} or {"file": float(reward)}


def row_as_json(row: Mapping[str, object]) -> bytes:
    """Return a row as JSON. Bytes become base64, and what JSON has no form for becomes its text."""
    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    return orjson.dumps(row, default=_plain, option=options)


def _plain(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _own_runner(config: AgentConfig) -> AgentRunner:
    assert config.runner is not None
    where = place(config.runner.path, config.runner.name)
    make = load_code(config.runner.path, config.runner.name, "agent.runner")
    try:
        runner: AgentRunner = make()
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"agent.runner: {where} failed: {said(error)}") from error
    if not callable(getattr(runner, "run", None)):
        raise ConfigError(f"agent.runner: {where} made {shown(runner)}, which has no method run(command)")
    return runner
