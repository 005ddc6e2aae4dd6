"""Which replicas may serve: the state machine under any sequence of events, and the policy over any snapshot."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.fleet.replica_state import (
    MAX_FAILURES,
    Answered,
    Attested,
    Based,
    CallFailed,
    CatchingUp,
    Died,
    Event,
    Leaving,
    Phase,
    Quarantined,
    ReplicaState,
    Slept,
    WeightsLost,
    Woke,
    after,
)
from millrace.fleet.routing import with_lora
from millrace.types import ALL_MEMORY, FinishReason, Generation, MemoryTag, VersionSpan

tags = st.frozensets(st.sampled_from(MemoryTag))
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Attested, st.integers(0, 9), st.none() | st.just("an adapter")),
    st.builds(Based, st.integers(0, 9)),
    st.builds(WeightsLost),
    st.builds(Slept, tags),
    st.builds(Woke, tags),
    st.builds(CatchingUp),
    st.builds(CallFailed, st.just("it broke off")),
    st.builds(Answered),
    st.builds(Leaving),
    st.builds(Quarantined, st.just("other bytes")),
    st.builds(Died, st.just("killed by SIGKILL")),
)


@given(st.lists(events))
def test_a_serving_replica_was_attested_after_its_weights_last_slept_and_never_distrusted(history: list[Event]) -> None:
    state = ReplicaState("e", "http://e")
    attested: int | None = None
    based = False
    asleep: frozenset[MemoryTag] = frozenset()
    ended = False
    failures = 0
    for event in history:
        serves, suspect = state.phase is Phase.READY and not asleep, state.phase is Phase.SUSPECT
        state = after(state, event)
        if ended:
            assert not state.routable
            assert state.phase in (Phase.DEAD, Phase.QUARANTINED, Phase.DRAINING)
            continue
        match event:
            case Attested(version, lora):
                based = based or lora is None
                attested = version if based else None
                failures = failures if not based else MAX_FAILURES - 1 if suspect else 0
            case Based():
                attested, based = None, True
            case WeightsLost():
                attested, based = None, False
            case Slept(what):
                asleep |= what
                if MemoryTag.WEIGHTS in what:
                    attested, based = None, False
            case Woke(what):
                asleep -= what
            case CallFailed():
                failures += serves
            case Answered():
                failures = MAX_FAILURES - 1 if suspect else 0
            case Quarantined() | Died() | Leaving():
                ended = True
        trusted = not ended and failures < MAX_FAILURES
        assert state.routable == (trusted and attested is not None and not asleep)
        if state.routable:
            assert state.version == attested


@given(st.lists(events))
def test_the_dead_never_come_back(history: list[Event]) -> None:
    state = after(ReplicaState("e", "http://e"), Died("killed by SIGKILL"))
    for event in history:
        state = after(state, event)
        assert state.phase is Phase.DEAD
        assert state.reason == "killed by SIGKILL"


def test_three_failures_in_a_row_make_a_suspect_and_an_answer_clears_it() -> None:
    state = after(ReplicaState("e", "http://e"), Attested(1))
    for _ in range(MAX_FAILURES - 1):
        state = after(state, CallFailed("it broke off"))
        assert state.routable
    assert after(state, Answered()).failures == 0
    suspect = after(state, CallFailed("it broke off"))
    assert suspect.phase is Phase.SUSPECT
    assert suspect.usable
    assert suspect.describe() == "e (suspect; version 1; it broke off)"
    cleared = after(suspect, Answered())
    assert (cleared.routable, cleared.reason) == (True, None)
    assert after(cleared, CallFailed("again")).phase is Phase.SUSPECT
    assert after(after(cleared, Answered()), CallFailed("again")).routable


@given(st.sets(st.sampled_from(MemoryTag), min_size=1))
def test_a_sleeping_replica_is_never_suspect(what: set[MemoryTag]) -> None:
    state = after(after(ReplicaState("e", "http://e"), Attested(1)), Slept(frozenset(what)))
    for _ in range(2 * MAX_FAILURES):
        state = after(state, CallFailed("it broke off"))
    assert state.phase is Phase.READY


def test_a_draining_replica_serves_no_more_and_dies_at_last() -> None:
    state = after(after(ReplicaState("e", "http://e"), Attested(1)), Leaving())
    for event in (Attested(2), Answered(), Woke(), CatchingUp()):
        assert after(state, event) == state
    assert after(state, Died("taken out")).phase is Phase.DEAD


def test_a_description_says_all_that_matters() -> None:
    state = after(after(ReplicaState("e0", "u"), Attested(3)), Slept(ALL_MEMORY))
    assert state.describe() == "e0 (ready; asleep: kv_cache, weights; without weights; publish a version)"
    assert "killed" in after(state, Died("killed by SIGKILL")).describe()


def test_an_adapter_has_the_whole_version_below_it_as_its_base() -> None:
    state = after(ReplicaState("e", "http://e"), Attested(3))
    over = after(state, Attested(5, "millrace-5"))
    assert (over.version, over.base, over.lora) == (5, 3, "millrace-5")
    assert "version 5, an adapter over version 3" in over.describe()
    whole = after(over, Attested(6))
    assert (whole.version, whole.base, whole.lora) == (6, 6, None)


VERSIONS = st.none() | st.integers(0, 20)


@given(st.lists(VERSIONS, max_size=4), st.integers(0, 20))
def test_tokens_of_an_older_base_count_as_the_adapters_version(said: list[int | None], version: int) -> None:
    version_spans = tuple(VersionSpan(maker, i, i + 1) for i, maker in enumerate(said))
    tokens = np.zeros(len(said), np.float32)
    made = Generation("r", (0,) * len(said), tokens, FinishReason.STOP, version_spans, 1, 0)
    told = [span.version for span in with_lora(made, version).version_spans]
    assert told == [version if maker is None else max(maker, version) for maker in said]
