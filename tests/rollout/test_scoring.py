"""Reward functions: what they are called with, what they may return, and which sample fails with which words."""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.tasks import RewardConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.calls import Calls
from millrace.rollout.sample import Episode, EpisodeEnd, Problem
from millrace.rollout.scoring import Played, RewardFunction, Rewards, load_rewards

PROBLEM = Problem("train-7", ({"role": "user", "content": "How many?"},), {"gold": "12"}, "12")


def played(answer: str = "#### 12") -> Played:
    turn = {"role": "assistant", "content": answer}
    mask, logprobs = np.ones(2, np.bool_), np.zeros(2, np.float32)
    episode = Episode((5, 6), mask, logprobs, (), turns=1, end=EpisodeEnd.ANSWERED, messages=(turn,))
    return Played.of(PROBLEM, episode, answer)


def rewards(*functions: Callable[..., object], weights: Sequence[float] = ()) -> Rewards:
    given_weights = weights or [1.0] * len(functions)
    return Rewards(tuple(RewardFunction.of(f, weight=w) for f, w in zip(functions, given_weights, strict=True)))


async def test_a_function_is_called_with_the_parameters_that_it_names() -> None:
    seen: dict[str, object] = {}

    def everything(conversation: Any, answer: Any, row: Any, problem: Any, episode: Any, other: int = 3) -> int:
        seen.update(conversation=conversation, answer=answer, row=row, problem=problem, episode=episode, other=other)
        return True

    async def one(*, answer: str, **_: object) -> float:
        return len(answer)

    one_played = played()
    assert await rewards(everything, one).for_sample(one_played, deadline=30) == {"everything": 1.0, "one": 7.0}
    assert seen == {
        "conversation": (*PROBLEM.messages, {"role": "assistant", "content": "#### 12"}),
        "answer": "#### 12",
        "row": {"gold": "12"},
        "problem": PROBLEM,
        "episode": one_played.episode,
        "other": 3,
    }


async def test_a_function_for_a_group_is_called_once_with_lists() -> None:
    calls: list[Any] = []

    def rank(answers: list[str], rows: list[Mapping[str, object]], conversations: list[Any]) -> Any:
        calls.append((answers, rows, [talk[-1]["content"] for talk in conversations]))
        return np.argsort(answers).astype(np.float32)

    own = rewards(rank, lambda answer: 0.5, weights=[2.0, 1.0])
    assert [function.name for function in own.of_groups] == ["rank"]
    assert await own.for_sample(played(), deadline=30) == {"<lambda>": 0.5}
    parts = await own.for_group([played("b"), played("a")], deadline=30)
    assert parts == [{"rank": 1.0}, {"rank": 0.0}]
    assert calls == [(["b", "a"], [{"gold": "12"}] * 2, ["b", "a"])]
    assert own.total({"rank": 1.0, "<lambda>": 0.5}) == 2.5


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=4))
def test_the_reward_is_the_weighted_sum(pairs: list[tuple[float, float]]) -> None:
    def function(answer: str) -> float:
        return 0.0

    own = Rewards(
        tuple(RewardFunction.of(function, name=f"f{i}", weight=weight) for i, (weight, _) in enumerate(pairs))
    )
    parts = {f"f{i}": value for i, (_, value) in enumerate(pairs)}
    assert math.isclose(own.total(parts), sum(w * v for w, v in pairs), abs_tol=1e-9)


def raising(answer: str) -> float:
    return {"a": 1}[answer]


async def async_raising(row: Any) -> float:
    raise RuntimeError("two\nlines")


def too_few(answers: list[str]) -> list[float]:
    return [1.0]


def one_for_all(answers: list[str]) -> float:
    return 1.0


def one_is_none(answers: list[str]) -> list[Any]:
    return [1.0, None]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raising, "the reward raising failed for row train-7: KeyError: '#### 12' (test_scoring.py:"),
        (async_raising, "the reward async_raising failed for row train-7: RuntimeError: two lines (test_scoring.py:"),
        (lambda answer: None, "the reward <lambda> returned None for row train-7; it must return a number"),
        (lambda answer: math.nan, "returned nan for row train-7"),
        (lambda answer: math.inf, "returned inf for row train-7"),
        (lambda answer: "1.0", "returned '1.0' for row train-7"),
        (lambda answer: [1.0], "returned [1.0] for row train-7"),
        (too_few, "the reward too_few returned 1 values for the 2 samples of row train-7"),
        (one_for_all, "returned 1.0 for row train-7; it must return a list with a number for each sample of the group"),
        (one_is_none, "returned None for row train-7; it must return a number"),
    ],
)
async def test_what_gives_no_reward_says_so_in_one_line(function: Callable[..., object], says: str) -> None:
    own = rewards(function)
    with pytest.raises(UserCodeError) as raised:
        if own.of_groups:
            await own.for_group([played(), played()], deadline=30)
        else:
            await own.for_sample(played(), deadline=30)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_what_hangs_fails_within_its_deadline_and_is_named() -> None:
    done = threading.Event()

    def hangs(answer: str) -> float:
        return float(done.wait())

    async def hangs_too(answer: str) -> float:
        await asyncio.Event().wait()
        return 1.0

    for function in (hangs, hangs_too):
        with pytest.raises(UserCodeError, match=rf"the reward {function.__name__} hangs for row train-7: it did not"):
            await rewards(function).for_sample(played(), deadline=0.05)
    done.set()


def required(answer: str, gold: str) -> float:
    return 1.0


def mixed(answer: str, rows: list[Any]) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (required, "required requires the parameter 'gold', which is not offered; it may name conversation, answer, r"),
        (mixed, "mixed mixes parameters of one sample with those of a group: answer, rows. For one sample a function"),
        (lambda **values: 1.0, "<lambda> names none of its parameters: conversation, answer"),
        (lambda answer, /: 1.0, "requires the parameter 'answer'"),
        (4, "4 is no function"),
    ],
)
def test_functions_that_cant_be_called_are_refused(function: Any, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RewardFunction.of(function, name="4" if function == 4 else "")
    assert says in str(raised.value)


def test_names_must_differ() -> None:
    with pytest.raises(ConfigError, match="2 functions are called 'raising'"):
        rewards(raising, raising)
    with pytest.raises(ConfigError, match="no function may be called 'judge'"):
        Rewards((RewardFunction.of(raising, name="judge"),))


def test_functions_are_loaded_by_the_settings(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def short(answer):\n    return 1\n\nclass Long:\n    pass\n")
    path = str(tmp_path / "own.py")
    own = load_rewards([RewardConfig(path=path, name="short", weight=0.5)], Calls())
    assert [(f.name, f.where, f.weight) for f in own.functions] == [("short", "own.py:short", 0.5)]
    with pytest.raises(ConfigError, match="reward: own.py:Long is no function"):
        load_rewards([RewardConfig(path=path, name="Long")], Calls())
    assert Rewards().by_rule
    assert not own.by_rule
