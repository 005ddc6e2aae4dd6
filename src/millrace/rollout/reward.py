"""The built-in reward: the rule for GSM8K's answers. It compares the number after the last `####` with the answer."""

import re
from fractions import Fraction

from millrace.errors import DataError
from millrace.rollout.numbers import LONGEST, parse_number
from millrace.rollout.sample import Problem

# A single word after the number is its unit: `84 apples`. Words that can be part of a number are not units.
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


async def gsm8k(answer: str, problem: Problem) -> float:
    """Return the rule reward of the text of a model's last turn."""
    return rule_reward(answer, problem.answer or "")


def require_number(problem: Problem) -> None:
    """Raise ValueError if the rule can't compare anything with the problem's answer."""
    if problem.answer is None:
        raise ValueError(
            'it has no column "answer", which the built-in reward needs; name the column in `answer:`, or give a '
            "`reward:` of your own"
        )
    if parse_number(reference(problem.answer)) is None:
        raise ValueError(
            f"its answer {problem.answer[-80:]!r} does not end in `#### ` and a number, and is no number, which the "
            "built-in reward needs; give a `reward:` of your own"
        )


def reference(answer: str) -> str:
    """Return the text after the last `####` of an answer in GSM8K's form. Other answers are returned whole."""
    return answer.rpartition("####")[2].strip()


def final_number(text: str) -> Fraction | None:
    """Return the number after the last `####`, with or without a unit of one word.

    Returns None if the rest of the text is anything else: no number is extracted from a longer text.
    """
    _, mark, tail = text.rpartition("####")
    tail = tail.strip()
    if not mark or len(tail) > LONGEST:
        return None
    number = parse_number(tail)
    if number is None and (match := _UNIT.fullmatch(tail)):
        unit = (match["latex"] or match["plain"]).casefold()
        number = None if unit in _PARTS_OF_NUMBERS.split() else parse_number(match["number"] + match["closing"])
    return number


def rule_reward(text: str, answer: str) -> float:
    """Return 1.0 if the final number of the model's last turn equals the answer's (7, 7.0 and 7/1 are equal), else 0.0.

    answer: a number, or a text that ends in `####` and a number. Raises DataError if it is neither.
    """
    if (expected := parse_number(reference(answer))) is None:
        raise DataError(f"the answer {answer[:80]!r} is not a number, so no text can be compared with it")
    return 1.0 if final_number(text) == expected else 0.0
