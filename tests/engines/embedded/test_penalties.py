"""The changes to logits are those of transformers and vLLM."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from millrace.engines.embedded.penalties import LogitChanges
from millrace.types import SamplingParams

SIZE = 12
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=8)
STOP = {1, 7}


@given(
    st.integers(),
    st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=8),
    TOKENS,
    TOKENS,
    st.floats(0.5, 2.0),
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
    st.integers(0, 6),
    st.dictionaries(st.integers(0, SIZE - 1), st.floats(-5.0, 5.0), max_size=4),
)
def test_they_count_what_they_should(
    seed: int,
    prompt: list[int],
    continued: list[int],
    output: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    least: int,
    bias: dict[int, float],
) -> None:
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed % 2**32))
    sampling = SamplingParams(
        8,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        min_new_tokens=least,
        logit_bias=bias,
    )
    changes = LogitChanges(sampling, prompt, continued, STOP)
    for token in output:
        changes.count(token)
    changed = logits.clone()
    changes.apply(changed, len(output))

    expected = logits.clone()
    for token, value in bias.items():
        expected[token] += value
    processors = LogitsProcessorList(
        [
            MinNewTokensLengthLogitsProcessor(len(prompt) + len(continued), least, sorted(STOP)),
            RepetitionPenaltyLogitsProcessor(repetition),
        ]
    )
    expected = processors(torch.tensor([prompt + continued + output]), expected[None])[0]
    for token in range(SIZE):
        if times := (continued + output).count(token):
            expected[token] -= frequency * times + presence
    torch.testing.assert_close(changed, expected)


def test_most_requests_change_nothing() -> None:
    assert not LogitChanges.needed(SamplingParams(8, temperature=0.5, top_k=3, stop=("a",)))
    for changed in (
        SamplingParams(8, logit_bias={1: 1.0}),
        SamplingParams(8, min_new_tokens=1),
        SamplingParams(8, presence_penalty=0.1),
    ):
        assert LogitChanges.needed(changed)
