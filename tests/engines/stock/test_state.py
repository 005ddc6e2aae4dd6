"""The state machine that stands in front of a stock server."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.state import InvalidStateError, ServerState
from millrace.types import ALL_MEMORY, MemoryTag, PauseMode

TAGS = st.sets(st.sampled_from(sorted(ALL_MEMORY)), min_size=1).map(frozenset)
STEPS = st.one_of(
    st.tuples(st.just("pausing"), st.sampled_from(PauseMode)),
    st.tuples(st.just("resuming")),
    st.tuples(st.just("sleeping"), TAGS),
    st.tuples(st.just("waking"), TAGS),
    st.tuples(st.just("beginning"), st.integers(0, 9)),
    st.tuples(st.just("loading")),
    st.tuples(st.just("committing")),
    st.tuples(st.just("rolling_back")),
)


@dataclass
class Server:
    """A model of a real server. It dies of the calls that a real one dies of."""

    released: set[MemoryTag] = field(default_factory=set)
    whole: bool = True
    dead: bool = False

    def follow(self, before: ServerState, after: ServerState) -> None:
        for tag in after.asleep - before.asleep:
            self.dead |= tag in self.released
            self.released.add(tag)
            self.whole &= tag is not MemoryTag.WEIGHTS
        for tag in before.asleep - after.asleep:
            self.dead |= tag not in self.released
            self.released.discard(tag)
        if after.loaded:
            self.dead |= MemoryTag.WEIGHTS in self.released
            self.whole = False
        if before.updating is not None and after.updating is None and before.loaded and not after.torn:
            self.whole = True
        if after.generating:
            self.dead |= bool(self.released)


@given(st.lists(STEPS, max_size=40))
def test_no_order_of_calls_kills_the_server_or_lets_it_serve_half_a_version(steps: list[tuple[object, ...]]) -> None:
    state, server = ServerState(), Server()
    for name, *arguments in steps:
        method: Callable[..., ServerState] = getattr(state, str(name))
        try:
            after = method(*arguments)
        except InvalidStateError:
            continue
        server.follow(state, after)
        state = after
        assert not server.dead
        assert server.whole or not state.generating
        assert not (state.generating and state.admission_closed)


@given(st.lists(STEPS, max_size=40))
def test_every_state_has_a_way_back_to_serving(steps: list[tuple[object, ...]]) -> None:
    state = ServerState()
    for name, *arguments in steps:
        method: Callable[..., ServerState] = getattr(state, str(name))
        try:
            state = method(*arguments)
        except InvalidStateError:
            continue
    state = state.rolling_back().waking(ALL_MEMORY)
    if state.torn or state.empty:
        state = state.beginning(1).loading().committing()
    assert state.resuming().generating
