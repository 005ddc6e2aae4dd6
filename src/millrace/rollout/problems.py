"""A seeded generator of grade-school word problems in GSM8K's format (Cobbe et al., arXiv:2110.14168).

A story starts with a number of things. One or two clauses change the number, each by one operator; the second clause
uses the result of the first. All numbers and results are positive integers.

The numbers give no hint of the operator: a clause's number divides the value before it, whatever the operator is.

The same (seed, index, held_out) gives the same problem everywhere. A checksum of operators and numbers decides whether
a problem is held out. So no held-out problem is a training problem with another name in it, whatever the seeds are.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from millrace.rollout.sample import Problem

OPERATORS = ("+", "-", "*", "/")
_HELD_OUT_SHARE = 5  # one in five combinations of operators and numbers is held out
_LARGEST_START = 60
_LARGEST_NUMBER = 12
_LARGEST_RESULT = 999
_MISREAD_AS = {"-": "+", "*": "+", "/": "*"}
_MISREAD_SHARE = 0.65

_PEOPLE = (
    ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Mia", "she"),
    ("Sam", "he"), ("Lena", "she"), ("Raj", "he"), ("Zoe", "she"),
)  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "toys")
_STARTS = ("{name} has {a} {things}.", "{name} starts with {a} {things}.")
# The clauses between the start and the last clause. {n} is the clause's own number.
_MIDDLES = {
    "+": ("Then {he} buys {n} more", "Then {he} finds {n} others"),
    "-": ("Then {he} loses {n}", "Then {he} gives {n} away"),
    "*": ("Then {he} fills {n} boxes with as many", "Then {he} gets as many in each of {n} weeks"),
    "/": ("Then {he} splits them into {n} heaps and keeps one", "Then {he} shares them among {n} children"),
}
# The last clause and its question.
_ENDS = {
    "+": (
        ("{He} gets {n} more", "How many {things} are there now?"),
        ("{He} adds {n} to the pile", "How many {things} are there in all?"),
        ("{He} borrows another {n}", "How many {things} are there now?"),
    ),
    "-": (
        ("{He} sells {n}", "How many {things} are left?"),
        ("{He} drops {n} on the way", "How many {things} are left?"),
        ("{He} throws {n} away", "How many {things} are still there?"),
    ),
    "*": (
        ("Each is worth {n} dollars", "How many dollars are they worth?"),
        ("The school has {n} times as many", "How many {things} does the school have?"),
        ("{He} needs as many for each of {n} days", "How many {things} does {he} need?"),
    ),
    "/": (
        ("{He} puts {n} into each box", "How many boxes does {he} need?"),
        ("{He} deals them out to {n} friends", "How many {things} does each friend get?"),
        ("{He} ties them into bundles of {n}", "How many bundles are there?"),
    ),
}


@dataclass(frozen=True, slots=True)
class Story:
    """A problem and its parts.

    clauses, operators: one for each step, in order; a clause has no full stop. numbers: the number that the story
    starts with, followed by one for each step.
    """

    question: str
    clauses: tuple[str, ...]
    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    def results(self) -> tuple[int, ...]:
        """Return the result of each step, in order."""
        results: list[int] = []
        value = self.numbers[0]
        for operator, number in zip(self.operators, self.numbers[1:], strict=True):
            value = _apply(operator, value, number)
            results.append(value)
        return tuple(results)

    def answer_text(self) -> str:
        """Return the answer in GSM8K's form: `<<left op right=result>>result` for each step, then a line `#### n`."""
        lines: list[str] = []
        left = self.numbers[0]
        for operator, number, result in zip(self.operators, self.numbers[1:], self.results(), strict=True):
            sum_text = f"{left}{operator}{number}"
            lines.append(f"{left} {operator} {number} = <<{sum_text}={result}>>{result}")
            left = result
        return "\n".join([*lines, f"#### {left}"])


def make_story(seed: int, index: int, *, held_out: bool = False) -> Story:
    """Return problem `index` of the stream `seed`. Half of the problems have one step, half have two."""
    draw = random.Random(f"{seed}/{index}/{held_out}")  # noqa: S311 - a problem is no secret
    operators = _draw_operators(draw, draw.choice((1, 2)))
    while True:
        numbers = _draw_numbers(draw, operators)
        if numbers is not None and _is_held_out(operators, numbers) is held_out:
            return _write_story(draw, operators, numbers)


def make_misread_story(seed: int, index: int) -> Story:
    """Return a training story whose `operators` are often wrong for its question, for the supervised warm-up.

    Additions stay; most subtractions and multiplications become additions, and most divisions multiplications. Such
    stories teach the form of an answer and the choice of its numbers, and leave the operators to reinforcement.
    """
    draw = random.Random(f"{seed}/{index}/misread")  # noqa: S311
    correct = _draw_operators(draw, draw.choice((1, 2)))
    operators = tuple(_MISREAD_AS.get(o, o) if draw.random() < _MISREAD_SHARE else o for o in correct)
    while True:
        numbers = _draw_numbers(draw, operators)
        if numbers is not None and not _is_held_out(correct, numbers):
            return replace(_write_story(draw, correct, numbers), operators=operators)


def generate_problems(seed: int, count: int, *, held_out: bool = False) -> Iterator[Problem]:
    """Yield the first `count` problems of the stream `seed`."""
    side = "held-out" if held_out else "train"
    for index in range(count):
        story = make_story(seed, index, held_out=held_out)
        yield Problem.of_question(f"generated-{side}-{seed}-{index}", story.question, str(story.results()[-1]))


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


def _draw_operators(draw: random.Random, steps: int) -> tuple[str, ...]:
    return tuple(draw.choice(OPERATORS) for _ in range(steps))


def _draw_numbers(draw: random.Random, operators: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return numbers for the operators; None if a value came up that allows no next number.

    The choice of the next number depends on the value only, not on the operator.
    """
    value = draw.randint(2, _LARGEST_START)
    numbers = [value]
    for operator in operators:
        largest = min(_LARGEST_NUMBER, value - 1, _LARGEST_RESULT // value)
        divisors = [number for number in range(2, largest + 1) if value % number == 0]
        if not divisors:
            return None
        numbers.append(draw.choice(divisors))
        value = _apply(operator, value, numbers[-1])
    return tuple(numbers)


def _is_held_out(operators: tuple[str, ...], numbers: tuple[int, ...]) -> bool:
    return zlib.crc32(f"{operators}{numbers}".encode()) % _HELD_OUT_SHARE == 0


def _write_story(draw: random.Random, operators: tuple[str, ...], numbers: tuple[int, ...]) -> Story:
    name, he = draw.choice(_PEOPLE)
    words = {"name": name, "he": he, "He": he.title(), "things": draw.choice(_THINGS)}
    start = draw.choice(_STARTS).format(a=numbers[0], **words)
    middles = [draw.choice(_MIDDLES[operator]) for operator in operators[:-1]]
    end, end_question = draw.choice(_ENDS[operators[-1]])
    clauses = tuple(
        clause.format(n=number, **words) for clause, number in zip([*middles, end], numbers[1:], strict=True)
    )
    question = " ".join([start, *(f"{clause}." for clause in clauses), end_question.format(**words)])
    return Story(question, clauses, numbers, operators)
