"""The task of a run: its problems, its tools and its rewards, loaded before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from millrace.config.models import RunConfig
from millrace.rollout.data import load_problems
from millrace.rollout.reward import require_number
from millrace.rollout.sample import Problem
from millrace.rollout.scoring import Rewards, load_rewards
from millrace.rollout.tools import Tool, make_tools


@dataclass(frozen=True, slots=True)
class Task:
    """What the samples of a run work on, with what, and for which reward."""

    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    tools: dict[str, Tool]
    rewards: Rewards

    def share(self, rank: int, ranks: int) -> "Task":
        """Return the task with this rank's share of the problems."""
        share = slice(rank, None, ranks)
        return replace(self, problems=self.problems[share], held_out=self.held_out[share])


def load_task(config: RunConfig) -> Task:
    """Return the task of the settings. Raises ConfigError or DataError, in one line, if part of it can't be used."""
    tools = make_tools(config.rollout.tools)
    rewards = load_rewards(config.reward)

    def check(problem: Problem) -> None:
        if rewards.by_rule:
            require_number(problem)
        if problem.answer is None and config.judges is not None and "{reference}" in config.judges.template:
            raise ValueError(
                "it has no answer, which judges.template asks for as {reference}; name its column in `answer:`, or "
                "give a template without it"
            )

    problems = load_problems(config.data, check=check)
    held_out = load_problems(config.evaluation.data, held_out=True, check=check)
    return Task(problems, held_out[: config.evaluation.problems], tools, rewards)
