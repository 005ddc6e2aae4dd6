"""What a finished sample is worth. The rule reward: is the number behind the last `####` the answer?"""

import re
from decimal import Decimal
from typing import Protocol

from millrace.rollout.sample import Problem

_FINAL_NUMBER = re.compile(r"\s*\$?\s*(-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")


class Reward(Protocol):
    """The reward of the text of a model's last turn. Raises JudgeError where there is none within `deadline` seconds,
    and the sample fails."""

    async def __call__(self, problem: Problem, text: str, *, deadline: float) -> float: ...


async def by_rule(problem: Problem, text: str, *, deadline: float) -> float:  # noqa: ARG001 (it takes no time)
    """The rule reward alone."""
    return rule_reward(text, problem.answer)


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####`, without thousands separators; None where there is no number."""
    _, mark, tail = text.rpartition("####")
    found = _FINAL_NUMBER.match(tail) if mark else None
    return Decimal(found.group(1).replace(",", "").replace("$", "")) if found else None


def rule_reward(text: str, answer: str) -> float:
    """1.0 where the final number of the model's last turn equals `answer` as a number (7, 7.0 and 1,234), else 0.0."""
    return 1.0 if final_number(text) == Decimal(answer) else 0.0
