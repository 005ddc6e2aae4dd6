"""Which engine gets a request: a pure policy over a snapshot, tested without engines."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.kv_events import Cleared, Removed, Stored
from millrace.fleet import routing
from millrace.fleet.prefixes import BLOCK_TOKENS, prompt_blocks
from millrace.fleet.replica_state import (
    Attested,
    CallFailed,
    Died,
    Event,
    Leaving,
    ReplicaState,
    Slept,
    Snapshot,
    after,
)
from millrace.fleet.routing import SPILL, Choice, RoutingPolicy, Why
from millrace.types import ANYWHERE, GenerateRequest, RoutingContext, SamplingParams

events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Attested, st.integers(0, 5)),
    st.builds(Slept),
    st.builds(CallFailed, st.just("it broke off"), st.just(3)),
    st.builds(Leaving),
    st.builds(Died, st.just("killed by SIGKILL")),
)
contexts = st.builds(
    RoutingContext,
    session=st.none() | st.sampled_from("xyz"),
    group=st.none() | st.sampled_from("gh"),
    min_version=st.none() | st.integers(0, 5),
    exact_version=st.none() | st.integers(0, 5),
)
prompts = st.builds(lambda start, length: tuple(range(start, start + length)), st.integers(0, 2), st.integers(1, 300))


def replicas(count: int, version: int = 1) -> Snapshot:
    new = (ReplicaState(f"e{i}", f"http://e{i}") for i in range(count))
    return Snapshot(0, tuple(after(state, Attested(version)) for state in new))


def asked(prompt: tuple[int, ...] = (1, 2, 3), *, room: int = 100) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_new_tokens=room), request_id="r")


def long(first: int, blocks: int) -> tuple[int, ...]:
    return tuple(range(first, first + blocks * BLOCK_TOKENS))


@given(
    st.lists(st.tuples(st.lists(events, max_size=3), st.integers(0, 500)), max_size=5),
    st.lists(st.tuples(contexts, prompts), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_only_a_routable_engine_is_chosen_and_the_same_one_each_time(
    fleet: list[tuple[list[Event], int]], requests: list[tuple[RoutingContext, tuple[int, ...]]], seed: int
) -> None:
    known = []
    for i, (history, _) in enumerate(fleet):
        state = ReplicaState(f"e{i}", f"http://e{i}")
        for event in [Attested(1), *history]:
            state = after(state, event)
        known.append(state)
    outstanding = {f"e{i}": load for i, (_, load) in enumerate(fleet)}
    one, same = RoutingPolicy(seed), RoutingPolicy(seed)
    for context, prompt in requests:
        request = asked(prompt)
        choice = one.choose(Snapshot(0, tuple(known)), outstanding, request, context)
        assert choice == same.choose(Snapshot(9, tuple(reversed(known))), outstanding, request, context)
        able = [state for state in known if state.routable and context.admits(state.version)]
        assert (choice is None) == (not able)
        if choice is None:
            continue
        [chosen] = [state for state in able if state.name == choice.engine]
        least = min(outstanding[state.name] for state in able)
        need = len(prompt) + request.sampling.max_new_tokens
        assert outstanding[chosen.name] + need <= SPILL * (least + need)
        if choice.why in (Why.LEAST_LOADED, Why.SPILL):
            assert outstanding[chosen.name] == least


@given(st.integers(2, 8), st.integers(1, 30), st.integers(0, 5))
def test_without_affinity_the_load_is_even(engines: int, requests: int, seed: int) -> None:
    router, snapshot, outstanding = RoutingPolicy(seed), replicas(engines), Counter[str]()
    for _ in range(requests):
        choice = router.choose(snapshot, outstanding, asked())
        assert choice is not None
        outstanding[choice.engine] += 103
    loads = [outstanding[state.name] for state in snapshot.replicas]
    assert max(loads) - min(loads) <= 103


def test_ranks_with_other_seeds_begin_with_other_engines() -> None:
    snapshot = replicas(8)
    first = {RoutingPolicy(seed).choose(snapshot, Counter(), asked()) for seed in range(20)}
    assert len(first) > 3


def test_a_session_stays_where_it_was_and_goes_when_that_is_overloaded() -> None:
    router, snapshot, session = RoutingPolicy(), replicas(3), RoutingContext(session="s")
    first = router.choose(snapshot, Counter(), asked(), session)
    assert first is not None
    assert first.why is Why.LEAST_LOADED
    home = first.engine
    loads = dict.fromkeys(snapshot.routable, 90) | {home: 200}
    assert router.choose(snapshot, loads, asked(), session) == Choice(home, Why.SESSION)
    loads[home] = 500
    other = router.choose(snapshot, loads, asked(), session)
    assert other is not None
    assert (other.why, other.engine != home) == (Why.SPILL, True)
    assert router.choose(snapshot, {**loads, home: 90}, asked(), session) == Choice(other.engine, Why.SESSION)


def test_the_samples_of_a_group_go_together_and_their_turns_apart() -> None:
    router, snapshot = RoutingPolicy(), replicas(2)
    first = router.choose(snapshot, Counter(), asked(), RoutingContext("s0", "g"))
    assert first is not None
    [other] = snapshot.routable.keys() - {first.engine}
    assert router.choose(snapshot, Counter(), asked(), RoutingContext("s1", "g")) == Choice(first.engine, Why.GROUP)
    spilt = router.choose(snapshot, {first.engine: 1000, other: 0}, asked(), RoutingContext("s2", "g"))
    assert spilt == Choice(other, Why.SPILL)
    # The next turn of the first sample does not move the group back.
    assert router.choose(snapshot, Counter(), asked(), RoutingContext("s0", "g")) == Choice(first.engine, Why.SESSION)
    assert router.choose(snapshot, Counter(), asked(), RoutingContext("s3", "g")) == Choice(other, Why.GROUP)


def test_the_longest_known_prefix_wins_if_it_is_most_of_the_prompt() -> None:
    router, snapshot = RoutingPolicy(), replicas(3)
    loads = Counter(dict.fromkeys(snapshot.routable, 0))
    short = router.choose(snapshot, loads, asked(long(0, 2)))
    assert short is not None
    loads[short.engine] = 10  # so that the next request goes elsewhere
    longer = router.choose(snapshot, loads, asked((*long(0, 1), *long(5000, 5))))
    assert longer is not None
    assert longer.engine != short.engine
    loads[longer.engine] = 20
    assert router.choose(snapshot, loads, asked((*long(0, 1), *long(5000, 6)))) == Choice(longer.engine, Why.PREFIX)
    assert router.choose(snapshot, loads, asked(long(0, 3))) == Choice(short.engine, Why.PREFIX)
    rest = router.choose(snapshot, loads, asked(long(0, 40)))
    assert rest is not None
    assert rest.why is Why.LEAST_LOADED


@pytest.mark.parametrize("routing", [RoutingContext(session="s"), RoutingContext(group="g"), ANYWHERE])
def test_a_prefix_that_an_engine_has_lost_draws_no_request(routing: RoutingContext) -> None:
    router, snapshot = RoutingPolicy(), replicas(2)
    first = router.choose(snapshot, Counter(), asked(long(0, 2)), routing)
    assert first is not None
    again = router.choose(snapshot, Counter({first.engine: 50}), asked(long(0, 2)), routing)
    assert again is not None
    assert again.engine == first.engine
    router.forget(first.engine)
    after_that = router.choose(snapshot, Counter({first.engine: 50}), asked(long(0, 2)), routing)
    assert after_that is not None
    assert after_that.engine != first.engine


def stored(prompt: tuple[int, ...], size: int = 16) -> Stored:
    """The event of an engine that has computed the prompt, with blocks of this size."""
    ends = range(size, len(prompt) + 1, size)
    return Stored(None, tuple((hash(prompt[:end]), prompt[end - size : end]) for end in ends))


def told(
    router: RoutingPolicy, prompt: tuple[int, ...], snapshot: Snapshot, extra: dict[str, object] | None = None
) -> bool:
    """Whether the prompt draws its request to e0 although e1 has less to do."""
    request = replace(asked(prompt), extra=extra or {})
    return router.choose(snapshot, Counter(e0=10, e1=0), request) == Choice("e0", Why.PREFIX)


@pytest.mark.parametrize(
    "lost",
    [
        lambda router: router.learn("e0", Cleared()),
        lambda router: router.learn("e0", Removed((hash(long(0, 2)), hash(long(0, 1))))),
        lambda router: router.forget("e0"),
        lambda router: router.missed("e0"),
        lambda router: router.unfollow("e0"),
        lambda router: router.follow("e0"),
    ],
    ids=["cleared", "removed", "forgotten", "missed", "unfollowed", "followed again"],
)
def test_an_engine_with_kv_events_is_known_by_what_it_reported(lost: Callable[[RoutingPolicy], None]) -> None:
    router, snapshot = RoutingPolicy(), replicas(2)
    for engine in snapshot.routable:
        router.follow(engine)
    for _ in range(2):  # the router learns nothing from prompts that it sends to an engine with events
        sent = router.choose(snapshot, Counter(e0=0, e1=10), asked(long(0, 2)))
        assert sent == Choice("e0", Why.LEAST_LOADED)
    router.learn("e0", stored(long(0, 2)))
    assert told(router, long(0, 2), snapshot)
    assert told(router, long(0, 4), snapshot)
    assert not told(router, long(0, 5), snapshot)  # less than half of it
    lost(router)
    assert not told(router, long(0, 2), snapshot)


def test_engines_with_and_without_kv_events_work_together() -> None:
    router, snapshot = RoutingPolicy(), replicas(2)
    router.follow("e0")
    sent = router.choose(snapshot, Counter(e0=10, e1=0), asked(long(0, 2)))
    assert sent == Choice("e1", Why.LEAST_LOADED)
    assert router.choose(snapshot, Counter(e0=0, e1=10), asked(long(0, 2))) == Choice("e1", Why.PREFIX)
    router.learn("e0", stored(long(0, 2)))
    assert router.choose(snapshot, Counter(e0=0, e1=10), asked(long(0, 2))) == Choice("e0", Why.PREFIX)
    router.unfollow("e0")
    assert router.choose(snapshot, Counter(e0=0, e1=10), asked(long(0, 2))) == Choice("e1", Why.PREFIX)


def test_a_prefix_of_the_base_model_draws_no_request_with_an_adapter() -> None:
    router, snapshot = RoutingPolicy(), replicas(2)
    for engine in snapshot.routable:
        router.follow(engine)
    router.learn("e0", stored(long(0, 2)))
    assert not told(router, long(0, 2), snapshot, {"lora_path": "tuned"})
    assert told(router, long(0, 2), snapshot)
    adapted = Snapshot(1, tuple(after(state, Attested(2, "tuned")) for state in snapshot.replicas))
    assert not told(router, long(0, 2), adapted)
    # With an adapter that the fleet published, the prompts that were sent count.
    assert router.choose(adapted, Counter(e0=0, e1=10), asked(long(0, 2))) == Choice("e1", Why.PREFIX)


@given(st.lists(st.integers(0, 3), max_size=400), st.integers(0, 400))
def test_prompts_share_as_many_blocks_as_they_share_tokens(tokens: list[int], cut: int) -> None:
    whole = prompt_blocks(tuple(tokens))
    assert len(whole) == len(tokens) // BLOCK_TOKENS
    part = prompt_blocks((*tokens[:cut], *([9] * max(0, len(tokens) - cut))))
    common = min(cut, len(tokens)) // BLOCK_TOKENS
    assert part[:common] == whole[:common]
    assert not set(part[common:]) & set(whole[common:])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MOST_HOMES", 4)
    monkeypatch.setattr(routing, "MOST_BLOCKS", 6)
    router, snapshot = RoutingPolicy(), replicas(2)
    for number in range(20):
        router.choose(snapshot, Counter(), asked(long(1000 * number, 2)), RoutingContext(str(number), str(number // 2)))
    assert len(router._homes) == 4
    assert len(router._blocks) == 6
    assert router.choose(snapshot, Counter({"e0": 9}), asked(), RoutingContext("19")) is not None


def test_a_session_waits_for_its_engine_and_others_go_where_there_is_room() -> None:
    router, both = RoutingPolicy(), replicas(2)
    outstanding = Counter({"e0": 100, "e1": 100})
    turn = RoutingContext(session="s")
    first = router.choose(both, outstanding, asked(), turn)
    assert first is not None
    assert router.home(turn) == first.engine
    other = ({"e0", "e1"} - {first.engine}).pop()
    assert router.choose(both, outstanding, asked(), turn, among={other}) is None
    assert router.choose(both, outstanding, asked(), among={other}) == Choice(other, Why.LEAST_LOADED)
    outstanding[first.engine] = 1000
    assert router.choose(both, outstanding, asked(), turn, among={other}) == Choice(other, Why.SPILL)
    assert router.choose(both, outstanding, asked(), turn, among=set()) is None
