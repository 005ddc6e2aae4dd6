"""The generator is reproducible and right, and training never sees its held-out side."""

import re
from collections import Counter
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.problems import OPERATORS, generate_problems, make_misread_story, make_story
from millrace.rollout.reward import reference

SEEDS = st.integers(0, 2**32)
INDICES = st.integers(0, 10**6)


@given(seed=SEEDS, index=INDICES, held_out=st.booleans())
def test_a_story_is_a_function_of_its_place(seed: int, index: int, held_out: bool) -> None:
    story = make_story(seed, index, held_out=held_out)
    assert story == make_story(seed, index, held_out=held_out)
    assert story != make_story(seed, index + 1, held_out=held_out)


@given(seed=SEEDS, index=INDICES)
def test_the_worked_answer_adds_up_and_ends_in_the_answer(seed: int, index: int) -> None:
    story = make_story(seed, index)
    steps = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>\4\n", story.answer_text())
    assert 1 <= len(steps) == len(story.operators) <= 2
    for left, operator, right, result in steps:
        value = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
            "/": int(left) / int(right),
        }[operator]
        assert value == int(result) > 0
    # The result of a step goes into the next one.
    assert all(steps[i][3] == steps[i + 1][0] for i in range(len(steps) - 1))
    assert reference(story.answer_text()) == steps[-1][3]


@given(seed=SEEDS, index=INDICES)
def test_the_question_tells_the_numbers_in_the_order_of_use(seed: int, index: int) -> None:
    story = make_story(seed, index)
    assert tuple(map(int, re.findall(r"\d+", story.question))) == story.numbers
    assert all(f"{clause}." in story.question for clause in story.clauses)


def test_held_out_problems_share_no_numbers_with_training_whatever_the_seeds() -> None:
    held_out = [make_story(seed, i, held_out=True) for seed in range(3) for i in range(500)]
    train = [make_story(seed, i) for seed in range(3) for i in range(2000)]
    warmup = [make_misread_story(seed, i) for seed in range(3) for i in range(2000)]
    held_out_keys = {(story.operators, story.numbers) for story in held_out}
    assert len(held_out_keys) > 200
    assert held_out_keys.isdisjoint((story.operators, story.numbers) for story in train)
    assert {story.question for story in held_out}.isdisjoint(story.question for story in warmup)


def test_every_operator_and_both_lengths_come_up() -> None:
    stories = [make_story(0, i) for i in range(2000)]
    lengths = Counter(len(story.operators) for story in stories)
    assert min(lengths.values()) > 800
    first, last = Counter(s.operators[0] for s in stories), Counter(s.operators[-1] for s in stories)
    assert set(first) == set(last) == set(OPERATORS)
    assert min(*first.values(), *last.values()) > 400


def test_a_misread_story_is_a_habit_and_not_a_rule() -> None:
    """Greedy imitation is right where a story adds. Everywhere else, the right operator is the less likely one."""
    read: dict[str, Counter[str]] = {operator: Counter() for operator in OPERATORS}
    for index in range(4000):
        told, misread = make_misread_story(0, index).clauses, make_misread_story(0, index).operators
        for clause, operator in zip(told, misread, strict=True):
            read[meaning(clause)][operator] += 1
    assert set(read["+"]) == {"+"}
    for operator, taken_as in {"-": "+", "*": "+", "/": "*"}.items():
        assert set(read[operator]) == {operator, taken_as}
        assert 0.3 < read[operator][operator] / read[operator].total() < 0.4


@cache
def meaning(clause: str) -> str:
    """Returns the operator of a clause. It looks for the clause's words in stories that were told correctly."""
    words = without_details(clause)
    return next(
        operator
        for story in (make_story(1, index) for index in range(4000))
        for operator, told in zip(story.operators, story.clauses, strict=True)
        if without_details(told) == words
    )


@cache
def without_details(clause: str) -> str:
    return " ".join(word for word in clause.split() if not word.isdigit() and word.lower() not in ("he", "she"))


def test_a_problem_has_the_storys_question_and_answer() -> None:
    problems = list(generate_problems(5, 20, held_out=True))
    stories = [make_story(5, i, held_out=True) for i in range(20)]
    assert [problem.question for problem in problems] == [story.question for story in stories]
    assert [problem.answer for problem in problems] == [str(story.results()[-1]) for story in stories]
    assert len({problem.problem_id for problem in problems}) == 20
