"""What a run is told about itself: each rule, and that it is told once."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.fleet.event_log import Metrics, Spans
from millrace.rollout.sample import EpisodeEnd
from millrace.train.advice import (
    RULES,
    Advisor,
    Advisory,
    Bounds,
    Seen,
    Work,
    gap_rising,
    no_signal,
    samples_failed,
    slow_engine,
    staleness_at_bound,
    truncated,
    work_of,
)
from millrace.train.metrics import StepMetrics

BOUNDS = Bounds(samples_per_group=8, max_staleness=2)


def step(number: int, **figures: Any) -> StepMetrics:
    healthy: dict[str, Any] = {
        "accuracy": None, "reward": 0.5, "staleness": 0.0, "groups_with_signal": 3, "logprob_gap": 0.001,
        "samples_finished": 8, "ends": {str(end): 0 for end in EpisodeEnd} | {"answered": 8},
    }  # fmt: skip
    return StepMetrics(**({"step": number, "weight_version": number + 1} | healthy | figures))


def seen(*figures: dict[str, Any]) -> list[Seen]:
    return [Seen(step(number, **one)) for number, one in enumerate(figures, start=1)]


def test_a_step_without_signal() -> None:
    [advisory] = no_signal(seen({"groups_with_signal": 0, "reward": 0.25}), BOUNDS)
    assert advisory.text == (
        "step 1 taught nothing: the rewards of each group are all equal (their mean is 0.25), so every advantage is 0"
    )
    assert "rollout.samples_per_group is 8" in advisory.do
    assert not list(no_signal(seen({"groups_with_signal": 0}, {}), BOUNDS))


@pytest.mark.parametrize(
    ("end", "setting"),
    [
        (EpisodeEnd.TOKEN_LIMIT, "rollout.max_turn_tokens"),
        (EpisodeEnd.CONTEXT_FULL, "engine.context_length"),
        (EpisodeEnd.TURN_LIMIT, "rollout.max_turns"),
    ],
)
def test_most_samples_are_cut_off(end: EpisodeEnd, setting: str) -> None:
    cut: dict[str, Any] = {"ends": {str(end): 6, "answered": 2}}
    half: dict[str, Any] = {"ends": {str(end): 4, "answered": 4}}
    [advisory] = truncated(seen(cut, half), BOUNDS)
    assert advisory.text == f"10 of 16 samples of steps 1 to 2 were cut off: 10 by {end}"
    assert setting in advisory.do
    assert not list(truncated(seen(half), BOUNDS))
    assert not list(truncated(seen(cut, half, half, half), BOUNDS))  # the first one is no longer looked at


def test_the_gap_rises() -> None:
    figures: list[dict[str, Any]] = [{"logprob_gap": 0.004}] * 5 + [{"logprob_gap": 0.02}] * 5
    [advisory] = gap_rising(seen(*figures), BOUNDS)
    assert advisory.text == (
        "the logprobs of engines and trainer differ by 0.02 nats in steps 6 to 10 (logprob_gap); it was 0.004 in steps "
        "1 to 5"
    )
    assert not list(gap_rising(seen(*figures[:9]), BOUNDS))
    spike: list[dict[str, Any]] = [{}] * 9 + [{"logprob_gap": 5.0}]
    assert not list(gap_rising(seen(*spike), BOUNDS))
    rounding: list[dict[str, Any]] = [{"logprob_gap": 1e-7}] * 5 + [{"logprob_gap": 1e-4}] * 5
    assert not list(gap_rising(seen(*rounding), BOUNDS))


def test_staleness_stays_at_its_bound() -> None:
    bound: dict[str, Any] = {"staleness": 1.9}
    [advisory] = staleness_at_bound(seen({}, bound, bound, bound), BOUNDS)
    assert "of steps 2 to 4 were 1.90 versions old on average, and may be 2" in advisory.text
    assert not list(staleness_at_bound(seen({}, bound, bound), BOUNDS))
    assert not list(staleness_at_bound(seen(bound, bound, bound), Bounds(8, 0)))


def test_an_engine_is_slow() -> None:
    fast, slow, idle = Work(20, 2000, 20.0), Work(20, 2000, 50.0), Work(2, 1, 50.0)
    steps = [Seen(step(number), {"a": fast, "b": slow, "c": fast, "d": idle}) for number in (1, 2, 3)]
    [advisory] = slow_engine(steps, BOUNDS)
    assert (advisory.engine, advisory.step) == ("b", 3)
    assert advisory.text.startswith("engine b made 40 tokens/s of a request in steps 1 to 3, and the other engines 100")
    assert not list(slow_engine(steps[:2], BOUNDS))
    alone = [Seen(step(number), {"b": slow}) for number in (1, 2, 3)]
    assert not list(slow_engine(alone, BOUNDS))


def test_samples_fail() -> None:
    steps = [Seen(step(4, samples_failed=2, samples_finished=6), {}, ("4-1", "it hangs"))]
    [advisory] = samples_failed(steps, BOUNDS)
    assert advisory.text == "step 4: 2 of 8 samples failed and were left out; 4-1: it hangs"


def test_each_is_said_once_until_it_has_stopped_and_comes_back() -> None:
    advisor = Advisor(BOUNDS)
    failing = "xx.x..x...x...."
    said = [
        bool(advisor.see(step(number, samples_failed=int(fails == "x")), {})) for number, fails in enumerate(failing, 1)
    ]
    assert [number for number, new in enumerate(said) if new] == [0, 10]  # three steps without it are its end


def test_two_engines_are_two_advisories() -> None:
    fast, slow = Work(20, 2000, 20.0), Work(20, 2000, 50.0)

    def after(steps: int, kinds: dict[str, Work]) -> dict[str, Work]:
        return {
            name: Work(steps * one.requests, steps * one.tokens, steps * one.seconds) for name, one in kinds.items()
        }

    advisor, engines = Advisor(BOUNDS), {"a": fast, "b": slow, "c": fast, "d": slow, "e": fast}
    said = [advisor.see(step(number), after(number, engines)) for number in range(1, 7)]
    assert [[one.engine for one in advice] for advice in said] == [[], [], ["b", "d"], [], [], []]


def test_the_work_of_an_engine_is_what_its_requests_took() -> None:
    metrics = Metrics()
    spans = metrics.request_spans["a"] = Spans()
    spans.add(1.5)
    spans.add(2.5)
    metrics.output_tokens["a"] = 80
    assert work_of(metrics, ["a", "b"]) == {"a": Work(2, 80, 4.0), "b": Work()}
    assert (work_of(metrics, ["a"])["a"].speed, Work().speed) == (20.0, 0.0)


def test_lines_of_engines_name_them() -> None:
    assert Advisory(1, "no_signal", "text", "do").record == {"step": 1, "kind": "no_signal", "text": "text", "do": "do"}
    assert Advisory(1, "slow_engine", "text", "do", "a").record["engine"] == "a"


FIGURES = st.fixed_dictionaries(
    {
        "reward": st.floats(0, 1), "staleness": st.none() | st.floats(0, 2), "logprob_gap": st.none() | st.floats(0, 9),
        "groups_with_signal": st.integers(0, 3), "samples_failed": st.integers(0, 3),
        "samples_finished": st.integers(0, 8),
        "ends": st.dictionaries(st.sampled_from([str(end) for end in EpisodeEnd]), st.integers(0, 8)),
    }
)  # fmt: skip
WORK = st.dictionaries(
    st.sampled_from("abc"), st.builds(Work, st.integers(0, 50), st.integers(0, 999), st.floats(0, 99))
)


@given(st.lists(st.tuples(FIGURES, WORK), min_size=1, max_size=15))
def test_whatever_the_figures_are_no_rule_breaks_and_nothing_is_said_twice_in_a_row(
    drawn: Sequence[tuple[dict[str, Any], dict[str, Work]]],
) -> None:
    advisor = Advisor(BOUNDS)
    before: list[set[tuple[str, str | None]]] = [set(), set(), set()]
    for number, (figures, work) in enumerate(drawn, start=1):
        said = advisor.see(step(number, **figures), work)
        found = {(one.kind, one.engine) for rule in RULES for one in rule(advisor.steps, BOUNDS)}
        assert {(one.kind, one.engine) for one in said} == found.difference(*before[-3:])
        assert all(one.step == number and one.text and one.do for one in said)
        before.append(found)
