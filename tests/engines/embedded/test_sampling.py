"""Drawing tokens, compared with probabilities that are computed in the plainest way."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from millrace.engines.embedded.sampling import LANE, sample, stream_key, uniforms

LOGITS = [2.0, 1.5, 1.5, 0.3, 0.0, -1.0, -2.0, -9.0]
DRAWS = 40_000


def lanes_of(count: int, *, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, min_p: float = 0.0) -> Any:
    lanes = np.zeros(count, LANE)
    lanes["stream"] = [stream_key(7, i) for i in range(count)]
    lanes["temperature"], lanes["top_k"], lanes["top_p"], lanes["min_p"] = temperature, top_k, top_p, min_p
    return lanes


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_nan_logits_still_give_a_token(filters: dict[str, Any]) -> None:
    tokens, logprobs = sample(torch.full((2, 8), torch.nan), lanes_of(2, **filters))
    assert all(0 <= token < 8 for token in tokens)
    assert np.isnan(logprobs).all()


def exact(temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float64]:
    """Computes the probabilities. Each filter judges the full distribution, and the tokens that all filters keep are
    scaled up to 1."""
    logits = np.array(LOGITS) / temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    keep = np.zeros(len(probs), bool)
    before = 0.0
    for rank, token in enumerate(sorted(range(len(probs)), key=lambda t: -probs[t])):  # the sort is stable
        keep[token] = (
            (top_k < 0 or rank < top_k) and (top_p >= 1 or before < top_p) and probs[token] >= min_p * probs.max()
        )
        before += probs[token]
    kept = np.where(keep, probs, 0)
    return np.asarray(kept / kept.sum())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.6, "top_k": -1, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 2, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.5, "top_k": -1, "top_p": 0.7, "min_p": 0.0},
        {"temperature": 1.0, "top_k": -1, "top_p": 1e-6, "min_p": 0.0},
        {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_draws_are_as_frequent_as_their_probabilities(params: Any) -> None:
    logits_BV = torch.tensor(LOGITS).expand(DRAWS, -1)
    tokens, logprobs = sample(logits_BV, lanes_of(DRAWS, **params))
    expected = exact(**params)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert not counts[expected == 0].any()
    spread = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 4.5 * spread + 1e-9).all()
    full = torch.log_softmax(torch.tensor(LOGITS) / params["temperature"], dim=-1).numpy()
    np.testing.assert_allclose(logprobs, full[tokens], atol=1e-6)


def test_rows_of_every_kind_side_by_side_draw_what_they_draw_alone() -> None:
    lanes = lanes_of(64)
    lanes["temperature"][::4] = 0
    lanes["top_p"][1::4] = 0.5
    lanes["top_k"][2::8] = 3
    lanes["temperature"][3::8] = 1.7
    lanes["drawn"] = np.arange(64)
    torch.manual_seed(0)
    logits_BV = torch.randn(64, 50) * 2
    tokens, logprobs = sample(logits_BV, lanes)
    for row in range(64):
        alone, logprob = sample(logits_BV[row : row + 1], lanes[row : row + 1])
        assert tokens[row] == alone[0]
        assert logprobs[row] == pytest.approx(logprob[0], abs=1e-6)
    assert (tokens[::4] == logits_BV[::4].argmax(-1).numpy()).all()


@given(seed=st.integers(-(2**63), 2**63 - 1), drawn=st.integers(0, 2**40))
def test_uniforms_lie_in_the_unit_interval_and_depend_on_seed_and_count_only(seed: int, drawn: int) -> None:
    stream = np.array([stream_key(seed, 0), stream_key(seed, 1)], np.uint64)
    counts = np.array([drawn, drawn], np.uint64)
    first, second = uniforms(stream, counts)
    assert 0 <= first < 1
    assert 0 <= second < 1
    assert first != second
    assert uniforms(stream[::-1].copy(), counts)[1] == first
    assert uniforms(stream, counts + np.uint64(1))[0] != first


def test_neighbouring_seeds_draw_unlike_numbers() -> None:
    streams = np.array([stream_key(seed, 0) for seed in range(2000)], np.uint64)
    for drawn in range(3):
        numbers = uniforms(streams, np.full(2000, drawn, np.uint64))
        assert abs(numbers.mean() - 0.5) < 0.03
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.1


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40), seed=st.integers(0, 1000))
def test_a_token_without_probability_is_never_drawn(logits: list[float], seed: int) -> None:
    lanes = lanes_of(1)
    lanes["stream"] = stream_key(seed, 0)
    tokens, logprobs = sample(torch.tensor([logits]), lanes)
    assert np.isfinite(logprobs).all()
    assert torch.softmax(torch.tensor(logits), -1)[tokens[0]] > 0
