"""Agents that are Python functions of the user, which the trainer's process calls."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millrace.agents.job import Ended, Job
from millrace.arguments import shown
from millrace.config.agents import AgentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.calls import Calls
from millrace.rollout.user_code import file_of, load_code, parameters, place, said

OFFERED = ("row", "prompt", "base_url", "api_key", "problem")
NO_DEADLINE = 1e9  # seconds: the player cancels the call when its time is over


@dataclass(frozen=True, slots=True)
class FunctionAgent:
    """A function of the user. takes: those of OFFERED that it names. returns: whether it returns the reward."""

    where: str
    function: Callable[..., object]
    takes: tuple[str, ...]
    returns: bool
    calls: Calls

    async def run(self, job: Job) -> Ended:
        """Call the function."""
        problem = job.problem
        offered = {
            "row": problem.row,
            "prompt": problem.question,
            "base_url": job.episode.base_url,
            "api_key": job.episode.api_key,
            "problem": problem,
        }
        given = {name: offered[name] for name in self.takes}
        try:
            value = await self.calls.run(self.function, given, deadline=NO_DEADLINE)
        except Exception as error:  # the user's function may raise anything
            return Ended(said(error, file_of(self.function)))
        return Ended(reward=self._reward(value, job)) if self.returns else Ended()

    def result(self, job: Job, ended: Ended) -> Ended:  # noqa: ARG002
        """Return the end as it is: the function has returned the reward."""
        if ended.reward is None:
            return ended
        return Ended(ended.failure, ended.reward, {"return": ended.reward})

    async def clean(self, job: Job, *, failed: bool) -> None:
        """Do nothing: a function has no folder."""

    def _reward(self, value: Any, job: Job) -> float:
        """Return the reward that the function returned. Raises UserCodeError if it is no number."""
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserCodeError(
                f"the agent {self.where} returned {shown(value)} for row {job.problem.problem_id}; it must return the "
                "reward, a number, or `reward:` names the functions that give it"
            )
        return number


def load_function(config: AgentConfig) -> FunctionAgent:
    """Return the agent of the settings, of which nothing is called. Raises ConfigError if it can't be used."""
    assert config.path is not None
    assert config.name is not None
    function, where = load_code(config.path, config.name, "agent"), place(config.path, config.name)
    if isinstance(function, type) or not callable(function):
        raise ConfigError(f"agent: {where} is no function")
    takes = parameters(function, f"agent: {where}", OFFERED)
    return FunctionAgent(where, function, takes, config.reward == "return", Calls(config.concurrency))
