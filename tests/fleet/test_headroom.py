"""How many requests fit into a KV cache: pure forecasts, compared with simulated engines."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.fleet.headroom import (
    USABLE,
    Correction,
    Flight,
    Forecast,
    Held,
    OutputLengths,
    compared,
    most_requests,
)
from millrace.types import EngineLoad

LIMIT = 1024
requests = st.builds(
    lambda prompt, made, certain: Held(prompt + made, made, LIMIT, certain),
    st.integers(1, 500),
    st.integers(0, LIMIT - 1),
    st.booleans(),
)


def learned(lengths: list[int], ended: bool = True) -> OutputLengths:
    outputs = OutputLengths()
    for length in lengths:
        outputs.add(length, ended=ended)
    return outputs


def load(running: int, waiting: int = 0, used: int = 0) -> EngineLoad:
    return EngineLoad(running, waiting, used, 10_000, 0.0)


def flight(prompt: int = 100, *, key: int = 0, sent: float = 0.0, most: int = LIMIT, before: int = 0) -> Flight:
    return Flight(prompt, key, before, most, certain=False, sent=sent)


@given(st.lists(st.integers(1, LIMIT), max_size=200), st.lists(requests, max_size=20))
def test_the_share_of_longer_outputs_falls_from_one(lengths: list[int], running: list[Held]) -> None:
    survival = learned(lengths).survival(running, LIMIT)
    assert survival.longer_N[0] == 1.0
    assert (survival.longer_N[:-1] >= survival.longer_N[1:]).all()
    assert (survival.longer_N >= 0).all()


def test_requests_that_still_run_make_outputs_look_longer() -> None:
    outputs = learned([50] * 20)
    alone = outputs.survival([], LIMIT).longer_N
    among = outputs.survival([Held(500, 400, LIMIT)] * 20, LIMIT).longer_N
    assert among[1] > alone[1] + 0.3  # half of the outputs are known to be longer than 50


def test_cut_outputs_say_that_outputs_are_at_least_so_long() -> None:
    survival = learned([100] * 50, ended=False).survival([], LIMIT)
    assert survival.beyond(np.array([100.0]))[0] > 0.8


@given(st.lists(requests, max_size=30), requests, st.integers(1000, 100_000), st.lists(st.integers(1, LIMIT)))
def test_the_forecast_holds_at_least_what_is_held_now(
    running: list[Held], new: Held, capacity: int, lengths: list[int]
) -> None:
    forecast = Forecast(capacity, learned(lengths).survival(running, LIMIT), LIMIT, running)
    if forecast.admits(new):
        assert sum(one.tokens for one in running) + new.tokens <= USABLE * capacity + 1e-6


@given(st.lists(requests, max_size=10), requests, st.integers(1000, 100_000))
def test_more_room_and_fewer_requests_never_admit_less(running: list[Held], new: Held, capacity: int) -> None:
    survival = learned([64, 128, 256] * 20).survival([], LIMIT)
    forecast = Forecast(capacity, survival, LIMIT, running)
    if forecast.admits(new):
        assert Forecast(capacity + 1000, survival, LIMIT, running).admits(new)
        assert Forecast(capacity, survival, LIMIT, running[1:]).admits(new)
        before = forecast.headroom
        forecast.add(new)
        assert forecast.headroom <= before


def test_requests_of_a_certain_length_are_packed_exactly() -> None:
    survival = OutputLengths().survival([], 100)
    forecast, count = Forecast(10_000, survival, 100), 0
    while forecast.admits(Held(100, 0, 100, certain=True)):
        forecast.add(Held(100, 0, 100, certain=True))
        count += 1
    assert 46 <= count <= int(USABLE * 10_000 / 199)


def test_a_request_beyond_all_known_lengths_may_go_on_to_its_limit() -> None:
    survival = learned([10] * 500).survival([], 40)
    running = [Held(100 + 39, 39, LIMIT)]
    assert Forecast(1000, survival, LIMIT, running).headroom < USABLE * 1000 - 139


@dataclass
class Running:
    prompt: int
    length: int
    made: int = 0


def simulate(limit: int | None, capacity: int, seed: int, count: int = 400) -> tuple[int, int]:
    """Return the steps that an engine needs for all requests, and how often it retracted one.

    limit: on running requests; None: the forecast decides.
    """
    draw, lengths = random.Random(seed), OutputLengths()
    waiting = [
        Running(draw.randrange(20, 100), min(LIMIT, max(8, int(draw.lognormvariate(4.2, 0.9))))) for _ in range(count)
    ]
    running: list[Running] = []
    steps = retracted = 0
    while waiting or running:
        held = [Held(one.prompt + one.made, one.made, LIMIT) for one in running]
        forecast = Forecast(capacity, lengths.survival(held, LIMIT), LIMIT, held)
        while waiting:
            new = Held(waiting[0].prompt, 0, LIMIT)
            if running and not (forecast.admits(new) if limit is None else len(running) < limit):
                break
            if sum(one.prompt + one.made for one in running) + waiting[0].prompt > capacity:
                break  # no engine begins a prompt that does not fit
            forecast.add(new)
            running.append(waiting.pop(0))
        for _ in range(4):
            steps += 1
            for one in running:
                one.made += 1
            for one in [one for one in running if one.made >= one.length]:
                lengths.add(one.made, ended=True)
                running.remove(one)
            while sum(one.prompt + one.made for one in running) > capacity:
                retracted += 1
                last = running.pop()
                waiting.insert(0, Running(last.prompt, last.length))
    return steps, retracted


@pytest.mark.parametrize("capacity", [4000, 16_000])
def test_the_forecast_is_as_good_as_the_best_constant(capacity: int) -> None:
    steps, retracted = simulate(None, capacity, seed=1)
    constants = {limit: simulate(limit, capacity, seed=1) for limit in (8, 16, 24, 32, 64, 128)}
    clean = min(steps for steps, retracted in constants.values() if retracted <= 4)
    assert retracted <= 4
    assert steps <= 1.1 * clean
    assert max(retracted for _, retracted in constants.values()) > 20  # a constant that is too high


def test_a_report_corrects_what_running_requests_hold() -> None:
    flights = [flight(key=i) for i in range(4)]
    alike = dict.fromkeys(range(4), 1)
    found = compared(flights, alike, load(4, used=4 * 150), asked=1.0, on_engine=4, now=1.0, speed=20.0)
    assert found == Correction(speed=50.0)
    assert flights[0].held(1.0, 50.0) == Held(150.0, 50.0, LIMIT)


def test_a_report_of_less_is_a_shared_part_of_the_prompts() -> None:
    flights = [flight(key=i) for i in range(4)]
    found = compared(
        flights, dict.fromkeys(range(4), 1), load(4, used=4 * 50), asked=1.0, on_engine=4, now=1.0, speed=10.0
    )
    assert flights[0].held(1.0, 10.0, less=found.less) == Held(50.0, 10.0, LIMIT)


def test_a_report_with_other_clients_requests_gives_them_the_rest() -> None:
    flights = [flight(key=i) for i in range(2)]
    found = compared(flights, {0: 1, 1: 1}, load(4, 1, used=800), asked=1.0, on_engine=2, now=1.0, speed=100.0)
    assert found.others == 3
    assert found.tokens == pytest.approx((800 - 400) / 3)


def test_requests_sent_after_the_question_do_not_count() -> None:
    flights = [flight(key=0), flight(key=1, sent=2.0)]
    found = compared(flights, {0: 1, 1: 1}, load(1, used=150), asked=1.0, on_engine=1, now=2.0, speed=0.0)
    assert found == Correction(speed=25.0)


def test_requests_that_ended_during_a_report_are_not_other_clients() -> None:
    found = compared([flight(key=0)], {0: 1}, load(3, used=300), asked=1.0, on_engine=3, now=2.0, speed=0.0)
    assert found.others == 0


def test_a_shared_prompt_is_held_once_and_stays() -> None:
    each = flight(300).held(1.0, 10.0, alike=3)
    assert each == Held(10.0, 10.0, LIMIT, stays=100.0)
    survival = learned([20] * 100).survival([], LIMIT)
    assert Forecast(400, survival, LIMIT, [each] * 3).headroom <= USABLE * 400 - 300


def test_continued_tokens_count_as_made() -> None:
    assert flight(150, before=50, most=100).held(1.0, 10.0) == Held(160.0, 60.0, 150)


def test_the_number_of_requests_has_the_engines_limit_and_a_few_more() -> None:
    assert most_requests(None, None) == float("inf")
    assert most_requests(64, None) == 72
    assert most_requests(4, load(4)) == 6
    assert most_requests(64, load(16, 3)) == 18  # its queue says that it runs no more
    assert most_requests(64, load(0, 72)) == 36  # their prompts are being computed
