"""One generation is put together from the calls that updates cut it into."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.continuation import Continuation
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams, VersionSpan

REQUEST = GenerateRequest((7, 8, 9), SamplingParams(max_new_tokens=100), request_id="r")
PIECES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6)


def piece(length: int, version: int, reason: FinishReason = FinishReason.ABORT) -> Generation:
    version_spans = (VersionSpan(version, 0, length),) if length else ()
    logprobs = np.full(length, -float(version), np.float32)
    return Generation(
        "r", tuple(range(length)), logprobs, reason, version_spans, prompt_tokens=3 + version, cached_tokens=0
    )


@given(PIECES)
def test_nothing_is_lost_or_doubled_and_the_segments_say_which_version_made_what(sizes: list[tuple[int, int]]) -> None:
    pieces = [piece(length, version) for length, version in sizes]
    whole = Continuation(REQUEST, pieces).result
    assert whole.output_ids == tuple(token for p in pieces for token in p.output_ids)
    assert len(whole.logprobs) == len(whole.output_ids)
    assert whole.prompt_tokens == pieces[0].prompt_tokens  # the prompt tokens of a continuation do not count
    versions = [version for length, version in sizes for _ in range(length)]
    assert [s.version for s in whole.version_spans for _ in range(s.start, s.end)] == versions
    assert [s.start for s in whole.version_spans] == [0, *(s.end for s in whole.version_spans)][
        : len(whole.version_spans)
    ]
    assert all(a.version != b.version for a, b in zip(whole.version_spans, whole.version_spans[1:], strict=False))


@given(PIECES)
def test_a_continuation_asks_for_exactly_what_is_missing(sizes: list[tuple[int, int]]) -> None:
    request = GenerateRequest((7, 8, 9), SamplingParams(max_new_tokens=100), request_id="r")
    pieces = [piece(length, version) for length, version in sizes]
    continuation = Continuation(request)
    for one in pieces:
        continuation.add(one)
    rest, made = continuation.rest, continuation.result.output_ids
    assert rest.input_ids == (7, 8, 9, *made)
    assert rest.sampling.max_new_tokens == 100 - len(made)
    assert continuation.aborted


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), st.integers(0, 3))
def test_a_token_keeps_the_experts_of_the_first_call_that_read_it(calls: list[tuple[int, bool]], start: int) -> None:
    """Each call returns rows that name it, from where it was asked to on, or none because it was lost."""
    continuation = Continuation(replace(REQUEST, routed_experts_start=start))
    expected: list[int] = []
    for number, (length, returned) in enumerate(calls):
        rest = continuation.rest
        end = len(rest.input_ids) + length - 1
        rows = None
        if returned and length:
            rows = np.full((end - rest.routed_experts_start, 2, 4), number, np.uint8)
            expected += [number] * len(rows)
        assert rest.routed_experts_start == start + len(expected) - (0 if rows is None else len(rows))
        continuation.add(replace(piece(length, 0), routed_experts=rows))
    whole = continuation.result.routed_experts
    assert ([] if whole is None else whole[:, 0, 0].tolist()) == expected
    last = max((i for i, (length, returned) in enumerate(calls) if length and returned), default=None)
    if last is not None:
        assert start + len(expected) == 3 + sum(length for length, _ in calls[: last + 1]) - 1


def test_tokens_that_a_grammar_drops_take_their_experts_along() -> None:
    request = GenerateRequest((7,), SamplingParams(8, json_schema="{}"), request_id="r")
    continuation = Continuation(request)
    continuation.add(replace(piece(3, 0), routed_experts=np.zeros((3, 2, 4), np.uint8)))
    assert continuation.rest.routed_experts_start == 0
    assert continuation.result.routed_experts is None


def test_a_generation_cut_off_after_its_last_token_is_full() -> None:
    request = GenerateRequest((7,), SamplingParams(max_new_tokens=4), request_id="r")
    continuation = Continuation(request)
    for one in (piece(3, 0), piece(1, 1)):
        assert continuation.aborted or not continuation.parts
        continuation.add(one)
    assert not continuation.aborted
    assert continuation.result.finish_reason is FinishReason.LENGTH


def test_without_a_part_the_result_is_aborted_and_empty() -> None:
    nothing = Continuation(REQUEST).result
    assert (nothing.output_ids, nothing.finish_reason, nothing.prompt_tokens) == ((), FinishReason.ABORT, 3)


@pytest.mark.parametrize(("least", "left"), [(0, 0), (3, 0), (9, 5)])
def test_a_continuation_counts_what_was_made_for_the_least_tokens_and_the_seed(least: int, left: int) -> None:
    sampling = SamplingParams(max_new_tokens=100, seed=2**63 - 2, min_new_tokens=least)
    request = GenerateRequest((7,), sampling, request_id="r", continued_tokens=1)
    rest = Continuation(request, [piece(4, 1)]).rest
    assert (rest.sampling.seed, rest.sampling.min_new_tokens) == (2, left)
    assert rest.continued_tokens == 5  # its own are output, too
    assert (
        Continuation(GenerateRequest((7,), SamplingParams(100), request_id="r"), [piece(4, 1)]).rest.sampling.seed
        is None
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6))
def test_the_prompt_is_scored_once_and_penalties_say_where_they_began_again(parts: list[tuple[int, bool]]) -> None:
    """Each part says that its penalties count nothing before it. A part that was aborted early has no logprobs."""
    request = replace(REQUEST, prompt_logprobs=True)
    continuation = Continuation(request)
    starts = []
    for length, scored in parts:
        rest, made = continuation.rest, len(continuation.result.output_ids)
        assert rest.prompt_logprobs == (continuation.result.prompt_logprobs is None)
        one = piece(length, 1)
        if scored and rest.prompt_logprobs:
            one = replace(one, prompt_logprobs=np.arange(len(rest.input_ids), dtype=np.float32))
        if rest.continued_tokens:
            one = replace(one, penalty_restarts=(0,))
            starts += [made] if length else []
        continuation.add(one)
    whole = continuation.result
    assert whole.penalty_restarts == tuple(starts)
    if any(scored for _, scored in parts):
        assert whole.prompt_logprobs is not None
        assert whole.prompt_logprobs.tolist() == [0, 1, 2]
    else:
        assert whole.prompt_logprobs is None


def test_the_text_is_that_of_the_last_part() -> None:
    parts = [replace(piece(2, 1), text="ab"), replace(piece(2, 1), text="abcd")]
    assert Continuation(REQUEST, parts).result.text == "abcd"


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6))
def test_the_prompt_of_images_is_that_of_the_request(parts: list[tuple[int, bool]]) -> None:
    """The engine expands the one placeholder to two tokens. A part that was aborted early has no prompt."""
    continuation = Continuation(REQUEST)
    for length, read in parts:
        expanded = (7, 8, 8, 9, *continuation.rest.input_ids[3:])
        continuation.add(replace(piece(length, 1), prompt_ids=expanded if read else None))
    read_any = any(read for _, read in parts)
    assert continuation.result.prompt_ids == ((7, 8, 8, 9) if read_any else None)
