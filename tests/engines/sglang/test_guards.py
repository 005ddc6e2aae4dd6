"""Requests that Millrace refuses before SGLang sees them. tests/conformance shows that a real server would die of
them."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.sglang.guards import (
    LETHAL_FIELDS,
    OWN_FIELDS,
    OWN_SAMPLING,
    check_request,
)
from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import InvalidStateError
from millrace.types import GenerateRequest, SamplingParams

LIMITS = Limits(vocab_size=100, context_length=50, seeds=False, penalties=False)
PNG = b"\x89PNG\r\n\x1a\n...IEND"  # an engine would say that it is damaged
SOUND = GenerateRequest((1, 2, 3), SamplingParams(8), request_id="r")


def extra(**fields: object) -> GenerateRequest:
    return replace(SOUND, extra=fields)


def further(**fields: object) -> GenerateRequest:
    return extra(sampling_params=fields)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 60))
def test_a_request_passes_exactly_when_it_fits(ids: list[int], room: int) -> None:
    request = GenerateRequest(tuple(ids), SamplingParams(room), request_id="r")
    if len(ids) + room <= LIMITS.context_length:
        check_request(request, LIMITS)
    else:
        with pytest.raises(InvalidStateError, match="do not fit into the server's context of 50"):
            check_request(request, LIMITS)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ((), "empty"),
        ((1, 100), "token 100; the vocabulary ends at 99"),
        ((1, -1), "token -1"),
        ((1, 2**63), "token 9223372036854775808"),
    ],
)
def test_a_prompt_that_the_server_would_die_of_is_refused(ids: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InvalidStateError, match=says):
        check_request(replace(SOUND, input_ids=ids), LIMITS)


@pytest.mark.parametrize(
    "request_",
    [
        *(extra(**{name: 1}) for name in sorted(OWN_FIELDS | LETHAL_FIELDS)),
        *(further(**{name: 1}) for name in sorted(OWN_SAMPLING)),
        extra(top_logprobs_num=101),
        extra(top_logprobs_num=[1]),
        extra(logprob_start_len=-2),
        extra(extra_key=["v"]),
        extra(sampling_params=[]),
        replace(SOUND, request_id="HEALTH_CHECK_1"),
        replace(SOUND, sampling=SamplingParams(8, top_k=2**31)),
        replace(SOUND, sampling=SamplingParams(8, seed=1)),
        replace(SOUND, sampling=SamplingParams(8, stop_token_ids=(100,))),
        replace(SOUND, sampling=SamplingParams(0)),
        replace(SOUND, sampling=SamplingParams(8, logit_bias={100: 1.0})),
        replace(SOUND, sampling=SamplingParams(8, presence_penalty=0.1)),
        replace(SOUND, routed_experts_start=len(SOUND.input_ids) + 1),
        extra(return_routed_experts=True),
        replace(extra(logprob_start_len=2), prompt_logprobs=True),
        replace(extra(image_data=["x"]), prompt_logprobs=True),
    ],
    ids=lambda r: f"{r.request_id} {r.sampling} {dict(r.extra)}"[:80],
)
def test_other_requests_that_the_server_would_die_of_or_ignore_are_refused(request_: GenerateRequest) -> None:
    with pytest.raises(InvalidStateError):
        check_request(request_, LIMITS)


@pytest.mark.parametrize(
    "request_",
    [
        SOUND,
        extra(top_logprobs_num=5, logprob_start_len=-1, extra_key="v1", return_hidden_states=True, routed_dp_rank=1),
        further(regex="[a-z]*"),
        replace(SOUND, sampling=SamplingParams(8, stop=("a", "b"), logit_bias={99: -100.0})),
        replace(SOUND, sampling=SamplingParams(8, min_new_tokens=8), prompt_logprobs=True),
    ],
)
def test_a_request_that_the_server_takes_passes(request_: GenerateRequest) -> None:
    check_request(request_, LIMITS)
    check_request(replace(request_, sampling=SamplingParams(8, seed=3)), replace(LIMITS, seeds=True))
    penalized = SamplingParams(8, repetition_penalty=1.05, frequency_penalty=0.1)
    check_request(replace(request_, sampling=penalized), replace(LIMITS, penalties=True))
    with pytest.raises(InvalidStateError, match="no tokenizer"):
        stopped = replace(request_, sampling=SamplingParams(8, stop=("a",)))
        check_request(stopped, replace(LIMITS, stop_texts=False))


@pytest.mark.parametrize(
    ("ids", "fields", "says"),
    [
        ((1, 7, 2), {}, None),
        ((7, 2), {}, "begins with an image"),
        ((1, 7, 2), {"video_data": "x"}, "in images or in extra"),
        ((1, 2), {}, "0 placeholders"),
    ],
)
def test_a_prompt_with_images_that_the_server_would_misread_is_refused(
    ids: tuple[int, ...], fields: dict[str, object], says: str | None
) -> None:
    request = replace(SOUND, input_ids=ids, images=(PNG,), extra=fields)
    with nullcontext() if says is None else pytest.raises(InvalidStateError, match=says):
        check_request(request, replace(LIMITS, image_token=7))
