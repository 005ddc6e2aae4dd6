import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.models import LossConfig
from millrace.train.loss import PolicyLoss, group_advantages, importance_weights, k3, policy_loss, supervised_loss

rewards = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=16)
PLAIN = LossConfig(clip_low=0.2, clip_high=0.28, importance_cap=None)


def test_advantages_of_a_group_by_hand() -> None:
    np.testing.assert_allclose(group_advantages([0, 1, 1, 0], normalize=True), [-1, 1, 1, -1])
    np.testing.assert_allclose(group_advantages([0, 1, 1, 0], normalize=False), [-0.5, 0.5, 0.5, -0.5])
    np.testing.assert_allclose(
        group_advantages([1, 0, 0, 0], normalize=True), [math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rtol=1e-6
    )


@given(st.floats(-1e3, 1e3), st.integers(0, 9), st.booleans())
def test_a_group_without_signal_teaches_nothing(reward: float, size: int, normalize: bool) -> None:
    advantages = group_advantages([reward] * size, normalize=normalize)
    assert advantages.dtype == np.float32
    assert advantages.tolist() == [0.0] * size


@given(rewards, st.booleans())
def test_advantages_are_centred_keep_the_order_and_have_unit_spread(values: list[float], normalize: bool) -> None:
    advantages = group_advantages(values, normalize=normalize)
    assert advantages.mean() == pytest.approx(0, abs=1e-4)
    assert (np.diff(advantages[np.argsort(values)]) >= -1e-6).all()
    if normalize and np.ptp(values) > 1e-6:
        assert advantages.std() == pytest.approx(1, abs=1e-4)


def loss_of(ratios: list[float], advantages: list[float], config: LossConfig = PLAIN) -> PolicyLoss:
    """Computes the loss of samples with one token each, with the given ratio of new to old probability. The loss is the
    sum over the samples."""
    logprobs = torch.tensor(ratios).log().unsqueeze(1)
    zeros = torch.zeros_like(logprobs)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return policy_loss(logprobs, zeros, zeros, None, mask, torch.tensor(advantages), config=config, normalizer=1.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.2, 1.0, -1.2, 0),
        (1.5, 1.0, -1.28, 1),  # clip_high stops a larger gain
        (0.5, 1.0, -0.5, 0),  # the pessimistic side is never clipped
        (0.5, -1.0, 0.8, 1),  # clip_low
        (1.5, -1.0, 1.5, 0),
        (1.5, 0.0, 0.0, 0),
    ],
)
def test_the_clip_by_hand(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    result = loss_of([ratio], [advantage])
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.sums.clipped.item() == clipped
    assert result.sums.tokens.item() == 1


@given(st.floats(0.01, 100), st.floats(-5, 5), st.floats(0.05, 0.9), st.floats(0.05, 3))
def test_a_token_gains_no_more_than_its_clip(ratio: float, advantage: float, low: float, high: float) -> None:
    loss = loss_of([ratio], [advantage], LossConfig(clip_low=low, clip_high=high, importance_cap=None)).loss.item()
    bound = -(1 + high) * advantage if advantage > 0 else -(1 - low) * advantage
    assert loss >= bound - 1e-4
    assert loss >= -ratio * advantage - 1e-3  # pessimistic: never better than without the clip


def random_batch(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, engine, reference = (-3 + 0.4 * torch.randn(rows, columns, generator=generator) for _ in range(4))
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    return logprobs, old, engine, reference, mask, torch.randn(rows, generator=generator)


def test_the_whole_loss_against_a_loop_over_tokens() -> None:
    logprobs, old, engine, reference, mask, advantages = random_batch(1, 5, 7)
    logprobs.requires_grad_()
    for average in ("token", "sequence"):
        config = LossConfig(kl_coefficient=0.3, importance_cap=1.2, average=average)
        normalizer = float(mask.sum() if average == "token" else mask.any(dim=1).sum())
        result = policy_loss(logprobs, old, engine, reference, mask, advantages, config=config, normalizer=normalizer)
        [gradient] = torch.autograd.grad(result.loss, logprobs)

        expected = torch.zeros(())
        for b in range(5):
            tokens = [t for t in range(7) if mask[b, t]]
            for t in tokens:
                ratio = torch.exp(logprobs[b, t] - old[b, t])
                gain = torch.min(ratio * advantages[b], ratio.clamp(0.8, 1.28) * advantages[b])
                weight = min(math.exp(old[b, t] - engine[b, t]), 1.2)
                difference = reference[b, t] - logprobs[b, t]
                token = -weight * gain + 0.3 * (difference.exp() - 1 - difference)
                expected = expected + token / (normalizer * (1 if average == "token" else len(tokens)))
        [expected_gradient] = torch.autograd.grad(expected, logprobs)
        torch.testing.assert_close(result.loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        gaps = (engine - old).abs()[mask]
        assert result.sums.gap.item() == pytest.approx(gaps.sum().item(), rel=1e-5)
        assert result.largest_gap.item() == pytest.approx(gaps.max().item())


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logprobs, _, _, _, mask, advantages = random_batch(2, 4, 6)
    logprobs.requires_grad_()
    old = logprobs.detach()
    result = policy_loss(logprobs, old, old, None, mask, advantages, config=LossConfig(), normalizer=8.0)
    [gradient] = torch.autograd.grad(result.loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages.unsqueeze(1) / 8.0, 0.0))


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from(["token", "sequence"]))
def test_shares_of_any_split_add_to_the_same_loss_gradient_and_sums(seed: int, cut: int, average: str) -> None:
    logprobs, old, engine, reference, mask, advantages = random_batch(seed, 8, 5)
    mask[0, 0] = True
    config = LossConfig(kl_coefficient=0.1, average=average)  # type: ignore[arg-type]
    normalizer = float(mask.sum() if average == "token" else mask.any(dim=1).sum())
    whole_logprobs, split_logprobs = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()

    def loss(x: torch.Tensor, rows: slice) -> PolicyLoss:
        arguments = (old[rows], engine[rows], reference[rows], mask[rows], advantages[rows])
        return policy_loss(x[rows], *arguments, config=config, normalizer=normalizer)

    whole, parts = (
        loss(whole_logprobs, slice(0, 8)),
        [loss(split_logprobs, slice(0, cut)), loss(split_logprobs, slice(cut, 8))],
    )
    whole.loss.backward()  # type: ignore[no-untyped-call]
    for part in parts:
        part.loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(split_logprobs.grad, whole_logprobs.grad)
    torch.testing.assert_close(torch.stack(whole.sums), torch.stack(parts[0].sums) + torch.stack(parts[1].sums))


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    old = torch.log(torch.tensor([[0.2, 0.2, 0.2]])).requires_grad_()
    engine = torch.log(torch.tensor([[0.4, 0.2, 0.02]]))
    weights = importance_weights(old, engine, torch.ones(1, 3, dtype=torch.bool), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.0, 2.0]]))
    assert not weights.requires_grad


def test_k3_is_the_divergence_in_expectation() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expectation = (p * k3(torch.log(q / p))).sum()
    torch.testing.assert_close(expectation, (p * torch.log(p / q)).sum())


@given(st.floats(-20, 20))
def test_k3_is_never_negative(log_ratio: float) -> None:
    assert k3(torch.tensor(log_ratio)).item() >= 0


def test_masked_values_have_no_effect() -> None:
    logprobs, old, engine, reference, mask, advantages = random_batch(3, 3, 4)
    mask[:, 1] = True
    config = LossConfig(kl_coefficient=0.1)

    def gradient(fill: float) -> torch.Tensor:
        filled = [torch.where(mask, x, fill) for x in (logprobs, old, engine, reference)]
        filled[0].requires_grad_()
        new, past, sampled, frozen = filled
        loss = policy_loss(new, past, sampled, frozen, mask, advantages, config=config, normalizer=5.0).loss
        return torch.autograd.grad(loss, filled[0])[0]

    torch.testing.assert_close(gradient(0.0), gradient(-math.inf))


@pytest.mark.parametrize("distance", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_policies_far_apart_give_finite_numbers(distance: float, advantage: float) -> None:
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    far = torch.tensor([[-1.0 + distance]])
    config = LossConfig(kl_coefficient=0.1)
    mask, advantages = torch.ones(1, 1, dtype=torch.bool), torch.tensor([advantage])
    result = policy_loss(logprobs, far, far, far, mask, advantages, config=config, normalizer=1.0)
    [gradient] = torch.autograd.grad(result.loss, logprobs)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(torch.stack([result.loss.double(), *result.sums])).all()


def test_supervised_loss_is_cross_entropy() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 5, 8])
    logprobs = torch.log_softmax(logits, dim=-1)[torch.arange(3), targets].unsqueeze(0)
    loss = supervised_loss(logprobs, torch.tensor([[True, False, True]]), normalizer=2.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[[0, 2]], targets[[0, 2]]))
