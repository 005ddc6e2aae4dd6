"""What a finished sample is worth. The rule reward: is what stands behind the last `####` the answer?"""

import re
from fractions import Fraction
from typing import Protocol

from millrace.errors import DataError
from millrace.rollout.numbers import LONGEST, parse_number
from millrace.rollout.sample import Problem

# One word behind the number names what is counted: `84 apples`. A word that can be a part of the number does not.
_UNIT = re.compile(
    r"(?P<number>.*?\S)"
    r"(?:\s*\\text\{\s*(?P<latex>[^\W\d_]{2,})\s*\}|[ \t]+(?P<plain>[^\W\d_]{2,}))(?P<closing>\W{0,6})",
    re.DOTALL,
)
_PARTS_OF_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million
millions billion billions trillion trillions lakh lakhs crore crores dozen dozens score scores gross pair pairs mn
mil bn tn half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth
eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths or and nor not to plus minus times
over by per of point negative squared cubed factorial mod modulo divided multiplied less more pi root
"""


class Reward(Protocol):
    """The reward of the text of a model's last turn. Raises JudgeError where there is none within `deadline` seconds,
    and the sample fails."""

    async def __call__(self, problem: Problem, text: str, *, deadline: float) -> float: ...


async def by_rule(problem: Problem, text: str, *, deadline: float) -> float:  # noqa: ARG001 (it takes no time)
    """The rule reward alone."""
    return rule_reward(text, problem.answer)


def final_number(text: str) -> Fraction | None:
    """The number that stands behind the last `####`, up to the end of the text, with or without a unit of one word.
    None where anything else stands there: a part of a text is never taken for the number."""
    _, mark, tail = text.rpartition("####")
    tail = tail.strip()
    if not mark or len(tail) > LONGEST:
        return None
    number = parse_number(tail)
    if number is None and (found := _UNIT.fullmatch(tail)):
        unit = (found["latex"] or found["plain"]).casefold()
        number = None if unit in _PARTS_OF_NUMBERS.split() else parse_number(found["number"] + found["closing"])
    return number


def rule_reward(text: str, answer: str) -> float:
    """1.0 where the final number of the model's last turn is exactly the number `answer` (7, 7.0 and 7/1 are one
    number), else 0.0. Raises DataError where `answer` is not a number."""
    if (wanted := parse_number(answer)) is None:
        raise DataError(f"the answer {answer[:80]!r} is not a number, so no text can be compared with it")
    return 1.0 if final_number(text) == wanted else 0.0
