"""A seeded generator of grade-school word problems in GSM8K's format (Cobbe et al., arXiv:2110.14168).

A story starts with a number of things; one or two clauses change that number, each by one operator. Two clauses make a
two-step problem: the result of the first goes into the second. Numbers and results are whole, positive and small.

The same (seed, index, held_out) gives the same problem everywhere. Held-out problems share no numbers with training
problems of the same operators, whatever their seeds: a checksum of operators and numbers decides which side they are
on, so a held-out problem is never a training problem with another name in it.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from millrace.rollout.sample import Problem

OPERATORS = ("+", "-", "*", "/")
_HELD_OUT_SHARE = 5  # one of so many combinations of operators and numbers is held out
_LARGEST_RESULT = 400

_PEOPLE = (
    ("Tom", "he", "his"), ("Anna", "she", "her"), ("Ben", "he", "his"), ("Mia", "she", "her"),
    ("Sam", "he", "his"), ("Lena", "she", "her"), ("Raj", "he", "his"), ("Zoe", "she", "her"),
)  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "toys")

_STARTS = (
    "{name} has {a} {things}.",
    "{name} starts with {a} {things}.",
    "There are {a} {things} in {name}'s bag.",
)
# What happens between the start and the last clause. {n} is the clause's own number.
_MIDDLES = {
    "+": ("Then {name} buys {n} more.", "Then {name} finds {n} more.", "A friend brings {n} more."),
    "-": ("Then {name} loses {n}.", "Then {name} gives away {n}.", "Then {n} of them break."),
    "*": ("Then {name} fills {n} boxes with that many each.", "Over {n} weeks {he} gets that many every week."),
    "/": ("Then {name} splits them evenly over {n} bags and keeps one bag.", "Then {n} children share them equally."),
}
# The last clause and its question.
_ENDS = {
    "+": (
        "{He} gets {n} more. How many {things} are there now?",
        "{He} adds {n} to {his} pile. How many {things} are there in all?",
        "{His} sister has {n} more than that. How many {things} does she have?",
    ),
    "-": (
        "{He} sells {n}. How many {things} are left?",
        "{He} drops {n} on the way. How many {things} are left?",
        "{His} brother has {n} fewer than that. How many {things} does he have?",
    ),
    "*": (
        "Each is worth {n} dollars. How many dollars are they worth?",
        "{His} school has {n} times as many. How many {things} does the school have?",
        "{He} needs that many for each of {n} days. How many {things} does {he} need?",
    ),
    "/": (
        "{He} puts {n} into each box. How many boxes does {he} need?",
        "{He} shares them among {n} friends. How many {things} does each friend get?",
        "{He} ties them into bundles of {n}. How many bundles does {he} make?",
    ),
}


@dataclass(frozen=True, slots=True)
class Story:
    """A problem with what it was made from. `numbers` has one more entry than `operators`, in the order of use."""

    question: str
    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    def results(self) -> tuple[int, ...]:
        """The result of each step, in order."""
        results: list[int] = []
        value = self.numbers[0]
        for operator, number in zip(self.operators, self.numbers[1:], strict=True):
            value = _apply(operator, value, number)
            results.append(value)
        return tuple(results)

    def answer_text(self) -> str:
        """The worked answer as GSM8K writes it: `<<left op right=result>>result` a step, and a last line `#### n`."""
        lines: list[str] = []
        left = self.numbers[0]
        for operator, number, result in zip(self.operators, self.numbers[1:], self.results(), strict=True):
            sum_text = f"{left}{operator}{number}"
            lines.append(f"{left} {operator} {number} = <<{sum_text}={result}>>{result}")
            left = result
        return "\n".join([*lines, f"#### {left}"])


def make_story(seed: int, index: int, *, held_out: bool = False) -> Story:
    """The problem number `index` of the stream `seed`. Half of the problems have one step, half have two."""
    draw = random.Random(f"{seed}/{index}/{held_out}")  # noqa: S311 - a problem is no secret
    operators = tuple(draw.choice(OPERATORS) for _ in range(draw.choice((1, 2))))
    while True:
        numbers = _draw_numbers(draw, operators)
        if numbers is not None and _is_held_out(operators, numbers) is held_out:
            return Story(_tell(draw, operators, numbers), numbers, operators)


def make_misread_story(seed: int, index: int) -> Story:
    """A story whose `operators` were drawn without a look at what its question tells; its numbers suit those operators.
    What it teaches is the form of an answer and which numbers go into it, and nothing about what to do with them."""
    draw = random.Random(f"{seed}/{index}/misread")  # noqa: S311
    steps = draw.choice((1, 2))
    told = tuple(draw.choice(OPERATORS) for _ in range(steps))
    operators = tuple(draw.choice(OPERATORS) for _ in range(steps))
    while True:
        numbers = _draw_numbers(draw, operators)
        if numbers is not None and not _is_held_out(told, numbers) and not _is_held_out(operators, numbers):
            return Story(_tell(draw, told, numbers), numbers, operators)


def generate_problems(seed: int, count: int, *, held_out: bool = False) -> Iterator[Problem]:
    """The first `count` problems of the stream `seed`."""
    side = "held-out" if held_out else "train"
    for index in range(count):
        story = make_story(seed, index, held_out=held_out)
        yield Problem(f"generated-{side}-{seed}-{index}", story.question, str(story.results()[-1]))


def _apply(operator: str, left: int, right: int) -> int:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left // right
        case _:
            raise ValueError(f"operator {operator!r} is none of {' '.join(OPERATORS)}")


def _draw_numbers(draw: random.Random, operators: tuple[str, ...]) -> tuple[int, ...] | None:
    """Numbers that make every result whole, positive and small; None where the draw did not come out so."""
    value = draw.randint(2, 60)
    numbers = [value]
    for operator in operators:
        number = draw.randint(2, 12 if operator in "*/" else 40)
        if operator == "/" and value % number != 0:
            return None
        value = _apply(operator, value, number)
        if not 1 <= value <= _LARGEST_RESULT:
            return None
        numbers.append(number)
    return tuple(numbers)


def _is_held_out(operators: tuple[str, ...], numbers: tuple[int, ...]) -> bool:
    return zlib.crc32(f"{operators}{numbers}".encode()) % _HELD_OUT_SHARE == 0


def _tell(draw: random.Random, operators: tuple[str, ...], numbers: tuple[int, ...]) -> str:
    name, he, his = draw.choice(_PEOPLE)
    words = {"name": name, "he": he, "He": he.title(), "his": his, "His": his.title(), "things": draw.choice(_THINGS)}
    parts = [draw.choice(_STARTS).format(a=numbers[0], **words)]
    if len(operators) == 2:
        parts.append(draw.choice(_MIDDLES[operators[0]]).format(n=numbers[1], **words))
    parts.append(draw.choice(_ENDS[operators[-1]]).format(n=numbers[-1], **words))
    return " ".join(parts)
