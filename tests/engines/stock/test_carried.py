"""What a server does not know of the calls before: where a stop text begins, and what was penalized."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.carried import cut, with_carried_penalties, with_text
from millrace.engines.stock.tokens import check_values
from millrace.engines.stop_texts import first_stop
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams, VersionSpan

EOS = 0
WORDS = ("", "a", "b", "ab", "ba", " a", "c", "bb")  # of each token; a first space is dropped, as SentencePiece does
TOKENS = st.lists(st.integers(1, len(WORDS) - 1), max_size=8).map(tuple)


async def detokenize(tokens: Sequence[int]) -> str:
    assert tokens
    return "".join(WORDS[token] for token in tokens).removeprefix(" ")


def text_of(tokens: Sequence[int], after: bool) -> str:
    text = "".join(WORDS[token] for token in tokens)
    return text if after else text.removeprefix(" ")


def generation(tokens: tuple[int, ...], reason: FinishReason) -> Generation:
    half = len(tokens) // 2
    spans = [VersionSpan(1, 0, half), VersionSpan(2, half, len(tokens))]
    logprobs = -np.arange(len(tokens), dtype=np.float32)
    return Generation("r", tokens, logprobs, reason, tuple(s for s in spans if s.start < s.end), 3, 0)


@given(TOKENS, TOKENS, TOKENS, st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple))
def test_a_text_ends_before_the_first_stop_text_wherever_the_calls_were_cut(
    prompt: tuple[int, ...], earlier: tuple[int, ...], output: tuple[int, ...], stop: tuple[str, ...]
) -> None:
    if first_stop(text_of(earlier, bool(prompt)), stop) is not None or not (prompt or earlier):
        return  # the earlier call would have ended there
    request = GenerateRequest(prompt + earlier, SamplingParams(9, stop=stop), continued_tokens=len(earlier))
    made = asyncio.run(with_text(request, generation(output, FinishReason.LENGTH), detokenize))
    count = next(
        (
            n
            for n in range(1, len(output) + 1)
            if first_stop(text_of(earlier + output[:n], bool(prompt)), stop) is not None
        ),
        None,
    )
    whole = text_of(earlier + output[:count], bool(prompt))
    assert made.text == whole[: first_stop(whole, stop)]
    assert made.output_ids == output[:count]
    assert len(made.logprobs) == len(made.output_ids) == (made.version_spans[-1].end if made.version_spans else 0)
    assert made.finish_reason is (FinishReason.LENGTH if count is None else FinishReason.STOP)


def test_the_token_that_ended_it_is_not_part_of_the_text() -> None:
    request = GenerateRequest((1,), SamplingParams(9, stop=("zz",)))
    made = asyncio.run(with_text(request, generation((1, 6, 2), FinishReason.STOP), detokenize))
    assert (made.text, made.output_ids) == ("ac", (1, 6, 2))
    empty = asyncio.run(with_text(request, generation((), FinishReason.ABORT), detokenize))
    assert (empty.text, empty.finish_reason) == ("", FinishReason.ABORT)


@given(TOKENS, st.integers(0, 8))
def test_a_cut_generation_is_what_it_was_before(tokens: tuple[int, ...], count: int) -> None:
    made = cut(generation(tokens, FinishReason.LENGTH), count)
    assert made.output_ids == tokens[:count]
    assert [s.version for s in made.version_spans for _ in range(s.start, s.end)] == [
        1 if place < len(tokens) // 2 else 2 for place in range(len(made.output_ids))
    ]


@pytest.mark.parametrize("counts_prompt", [True, False])
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.5, 2.0, -1.0]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([1.0, 1.2]),
)
def test_a_frequency_penalty_is_carried_as_bias(
    counts_prompt: bool, ids: tuple[int, ...], continued: int, frequency: float, presence: float, repetition: float
) -> None:
    sampling = SamplingParams(
        4, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias={0: 99.5}
    )
    request = GenerateRequest(ids, sampling, continued_tokens=min(continued, len(ids)))
    sent, exact = with_carried_penalties(request, counts_prompt=counts_prompt)
    check_values(sent)
    earlier = ids[len(ids) - request.continued_tokens :]
    for token in range(6):
        wanted = (99.5 if token == 0 else 0.0) - frequency * earlier.count(token)
        assert sent.sampling.logit_bias.get(token, 0.0) == min(wanted, 100.0)
    lost = bool(presence) or (repetition != 1 and (not counts_prompt or bool(frequency)))
    assert exact == (not earlier or not sampling.penalizes or not lost)
