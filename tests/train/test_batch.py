from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.train.batch import (
    TrainSample,
    collate,
    make_microbatches,
    plan_microbatches,
    plan_minibatches,
    supervised_sample,
)
from tests.train.small_models import make_samples

lengths = st.lists(st.integers(1, 300), max_size=60)


@given(lengths, st.integers(1, 1000))
def test_every_sample_is_in_one_microbatch_and_the_limit_holds(lengths: list[int], limit: int) -> None:
    batches = plan_microbatches(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


@given(lengths, st.integers(1, 1000))
def test_microbatches_hold_neighbours_in_length_and_as_many_as_fit(lengths: list[int], limit: int) -> None:
    batches = plan_microbatches(lengths, limit)
    for batch, following in pairwise(batches):
        assert min(lengths[i] for i in batch) >= max(lengths[i] for i in following)
        assert (len(batch) + 1) * lengths[batch[0]] > limit


@given(st.integers(0, 50), st.integers(1, 9))
def test_minibatches_are_even_and_lose_nothing(samples: int, count: int) -> None:
    plan = plan_minibatches(samples, count)
    assert len(plan) == count
    assert sorted(index for part in plan for index in part) == list(range(samples))
    assert max(map(len, plan)) - min(map(len, plan)) <= 1


def test_minibatches_share_each_group() -> None:
    assert plan_minibatches(8, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_collate_keeps_the_tokens_and_pads_outside_the_mask() -> None:
    samples = make_samples(6)
    batch = collate(samples)
    for row, sample in enumerate(samples):
        length = sample.token_ids.size
        np.testing.assert_array_equal(batch.token_ids_BT[row, :length], sample.token_ids)
        np.testing.assert_array_equal(batch.mask_BT[row, :length], sample.loss_mask)
        kept = sample.loss_mask
        np.testing.assert_array_equal(batch.engine_logprobs_BT[row, :length].numpy()[kept], sample.logprobs[kept])
        assert not batch.mask_BT[row, length:].any()
        assert batch.advantages_B[row].item() == np.float32(sample.advantage)


def test_no_samples_make_no_microbatches() -> None:
    assert make_microbatches([], 100) == []


def test_samples_that_do_not_fit_together_are_refused() -> None:
    ids, mask, logprobs = np.arange(3), np.array([False, True, True]), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="one length"):
        TrainSample(ids, mask[:2], logprobs, 0.0)
    with pytest.raises(ValueError, match="one token at least"):
        TrainSample(ids[:0], mask[:0], logprobs[:0], 0.0)
    with pytest.raises(ValueError, match="must be bool"):
        TrainSample(ids, mask.astype(np.int64), logprobs, 0.0)
    with pytest.raises(ValueError, match="no prediction"):
        supervised_sample([1, 2], [True, True])
