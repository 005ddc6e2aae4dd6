"""How many engines a fleet needs: the pure decision, over loads of every kind."""

from hypothesis import assume, given
from hypothesis import strategies as st

from millrace.config.engines import ReplicaRange
from millrace.fleet.scaling import SCALE_UP_DELAY, Load, Scaling, needed

LOADS = st.builds(
    Load,
    waiting=st.integers(0, 500),
    waited=st.floats(0, 60),
    running=st.integers(0, 500),
    room=st.none() | st.integers(1, 1024),
    headroom=st.floats(0, 1),
    serving=st.integers(0, 8),
    starting=st.integers(0, 8),
    wanted=st.integers(0, 1),
)


@st.composite
def ranges(draw: st.DrawFn) -> ReplicaRange:
    least = draw(st.integers(0, 8))
    most = draw(st.integers(max(least, 1), 16))
    return ReplicaRange(min=least, max=most, idle_seconds=draw(st.floats(1, 600)))


@given(ranges(), st.lists(st.tuples(LOADS, st.floats(0.1, 100)), min_size=1, max_size=20))
def test_the_number_is_within_the_bounds(limits: ReplicaRange, looks: list[tuple[Load, float]]) -> None:
    scaling, now = Scaling(limits), 0.0
    for load, seconds in looks:
        now += seconds
        assert limits.min <= scaling.engines(load, now) <= limits.max


@given(LOADS)
def test_only_requests_that_have_waited_for_a_moment_ask_for_more_engines_than_there_are(load: Load) -> None:
    engines, need = load.serving + load.starting, needed(load)
    if need > max(engines, load.wanted, int(load.running > 0)):
        assert load.waiting
        assert load.waited >= SCALE_UP_DELAY or not engines


@given(LOADS)
def test_requests_that_wait_always_have_an_engine(load: Load) -> None:
    assume(load.waiting or load.running or load.wanted)
    if load.serving or load.waiting or load.wanted:
        assert needed(load) >= 1


@given(LOADS, st.integers(1, 500))
def test_more_waiting_requests_never_need_fewer_engines(load: Load, more: int) -> None:
    assume(load.waiting)
    larger = Load(**{name: getattr(load, name) for name in Load.__slots__} | {"waiting": load.waiting + more})
    assert needed(larger) >= needed(load)


@given(ranges(), st.lists(LOADS, min_size=1, max_size=30), st.floats(0.1, 5))
def test_no_engine_leaves_that_was_needed_within_the_window(
    limits: ReplicaRange, loads: list[Load], step: float
) -> None:
    scaling, needs = Scaling(limits), list[tuple[float, int]]()
    for index, load in enumerate(loads):
        now = index * step
        needs.append((now, min(needed(load), limits.max)))
        window = [need for at, need in needs if at > now - limits.idle_seconds]
        assert scaling.engines(load, now) >= max(window)


@given(ranges(), st.integers(1, 64), st.integers(1, 2000), st.integers(1, 16))
def test_a_steady_load_does_not_make_the_number_go_up_and_down(
    limits: ReplicaRange, each: int, requests: int, engines: int
) -> None:
    """With engines that run `each` requests at once, and start within a look, the number soon stays."""
    scaling, seen, waited = Scaling(limits), [], 0.0
    for look in range(60):
        running = min(requests, engines * each)
        waiting = requests - running
        waited = waited + limits.idle_seconds if waiting else 0.0
        load = Load(waiting, waited, running, engines * each, 1.0 - running / max(engines * each, 1), engines)
        engines = scaling.engines(load, look * limits.idle_seconds)
        seen.append(engines)
    assert len(set(seen[30:])) == 1
    assert engines == limits.max or engines * each >= requests


def test_an_idle_fleet_shrinks_only_when_the_window_has_passed() -> None:
    scaling = Scaling(ReplicaRange(min=0, max=4, idle_seconds=10.0))
    assert scaling.engines(Load(serving=2, running=100, room=128), 0.0) == 2
    assert scaling.engines(Load(serving=2), 5.0) == 2
    assert scaling.engines(Load(serving=2), 9.9) == 2
    assert scaling.engines(Load(serving=2), 10.0) == 0


def test_engines_that_are_being_started_count() -> None:
    scaling = Scaling(ReplicaRange(min=1, max=8))
    full = Load(waiting=192, waited=SCALE_UP_DELAY, running=64, room=64, serving=1)
    assert scaling.engines(full, 0.0) == 4
    coming = Load(waiting=192, waited=10.0, running=64, room=64, serving=1, starting=3)
    assert scaling.engines(coming, 1.0) == 4


def test_a_full_kv_cache_keeps_an_engine_that_runs_few_requests() -> None:
    assert needed(Load(running=4, room=128, headroom=0.1, serving=2)) == 2
    assert needed(Load(running=4, room=128, headroom=0.9, serving=2)) == 1


def test_from_zero_one_engine_shows_how_many_requests_an_engine_takes() -> None:
    assert needed(Load(waiting=1000)) == 1
    assert needed(Load(wanted=1)) == 1
    assert needed(Load()) == 0
