"""The scheduler's decisions: which requests wait, which run, and which tokens belong to which."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.embedded.scheduler import (
    WORTH_WAITING_FOR,
    Prefill,
    Request,
    Scheduler,
    Span,
    common_prefixes,
    cut_wave,
    group,
)
from millrace.types import FinishReason, SamplingParams


def request(
    name: str = "r", prompt: list[int] | None = None, *, limit: int = 8, stop: frozenset[int] = frozenset()
) -> Request:
    return Request(
        id=name,
        prompt=np.array([1, 2, 3] if prompt is None else prompt, np.int64),
        sampling=SamplingParams(max_new_tokens=limit),
        stream_key=0,
        stop=stop,
        limit=limit,
        streams=False,
    )


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=120), min_size=1, max_size=12)


@given(prompts=prompts, limit=st.integers(1, 400))
def test_waves_take_every_request_once_and_keep_to_their_limit(prompts: list[list[int]], limit: int) -> None:
    pending = group([request(str(i), prompt) for i, prompt in enumerate(prompts)])
    assert len({p.tokens.tobytes() for p in pending}) == len(pending)
    served: list[str] = []
    while pending:
        wave, pending = cut_wave(pending, limit)
        assert wave
        assert len(wave) == 1 or len(wave) * max(len(p.tokens) for p in wave) <= limit
        for i, one in enumerate(wave):
            for two in wave[:i]:
                shared = common_prefixes(two.tokens[None, :-1], np.array([len(two.tokens) - 1]), one.tokens[:-1])[0]
                assert shared < WORTH_WAITING_FOR
        served += [r.id for p in wave for r in p.requests]
    assert sorted(served) == sorted(str(i) for i in range(len(prompts)))


def test_a_request_that_has_the_prefix_already_need_not_wait_for_it() -> None:
    tokens = np.arange(100)
    first = Prefill([request()], tokens, source=1, reused=90)
    second = Prefill([request()], np.append(tokens, 7), source=1, reused=90)
    assert cut_wave([first, second], 4096) == ([first, second], [])


@given(
    rows=st.lists(st.lists(st.integers(0, 1), max_size=8), min_size=1, max_size=6),
    tokens=st.lists(st.integers(0, 1), max_size=8),
)
def test_common_prefixes(rows: list[list[int]], tokens: list[int]) -> None:
    table = np.zeros((len(rows), 8), np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    found = common_prefixes(table, np.array([len(row) for row in rows]), np.array(tokens, np.int64))
    for row, length in zip(rows, found, strict=True):
        assert row[:length] == tokens[:length]
        assert length == min(len(row), len(tokens)) or row[length] != tokens[length]


@given(parts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=8))
def test_spans_cover_the_output_in_order_and_without_a_gap(parts: list[tuple[str, int]]) -> None:
    one = request(limit=1000)
    made: list[str] = []
    for version, count in parts:
        for _ in range(count):
            one.add(5, -1.0)
            made.append(version)
        one.close_span(version)
    spans = one.snapshot("last").spans
    assert [version for s in spans for version in [s.version] * (s.end - s.start)] == made
    assert [s.start for s in spans] == [0, *(s.end for s in spans)][: len(spans)]
    assert all(a.version != b.version for a, b in itertools.pairwise(spans))


def test_an_open_span_belongs_to_the_version_that_serves() -> None:
    one = request()
    one.add(5, -1.0)
    one.close_span("1")
    one.add(6, -1.0)
    assert one.snapshot("2").spans == (Span("1", 0, 1), Span("2", 1, 2))
    assert one.snapshot("1").spans == (Span("1", 0, 2),)


def test_a_request_ends_at_its_stop_token_or_its_length() -> None:
    one = request(limit=3, stop=frozenset({9}))
    assert one.add(1, 0.0) is None
    finish = one.add(9, 0.0)
    assert finish is not None
    assert (finish.reason, finish.detail) == (FinishReason.STOP, 9)
    last = one.add(1, 0.0)
    assert last is not None
    assert (last.reason, last.detail) == (FinishReason.LENGTH, 3)


def test_retracted_requests_go_to_the_front_in_their_order() -> None:
    scheduler = Scheduler(2)
    scheduler.waiting.extend(request(name) for name in "abcd")
    scheduler.running.extend(scheduler.admit())
    assert [r.id for r in scheduler.running] == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.retract()
    assert [r.id for r in scheduler.waiting] == ["a", "b", "c", "d"]
    assert [r.retractions for r in scheduler.waiting] == [1, 1, 0, 0]
    assert [r.id for r in scheduler.drop_waiting(lambda r: r.id in "bc")] == ["b", "c"]
    assert [r.id for r in scheduler.live()] == ["a", "d"]
