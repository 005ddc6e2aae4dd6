"""The loss of GRPO as pure functions of tensors.

Tensors named `*_BT` are [B, T], one row a sample, padded on the right, and aligned with the tokens: column t belongs to
token t, not to the position that predicts it. Everything is computed in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.config.models import LossConfig
from millrace.types import Float32Array

NO_SIGNAL = 1e-6  # rewards of a group that differ by at most this count as equal
MAX_LOG_RATIO = 20.0  # its exponential is 4.9e8: far above any clip limit, and far below the overflow of float32


def group_advantages(rewards_S: Sequence[float], *, normalize: bool) -> Float32Array:
    """Return the advantage of each sample of a group: its reward minus the group's mean.

    With `normalize` it is divided by the group's (population) standard deviation, as in GRPO (arXiv:2402.03300).
    Without it the advantage is that of Dr. GRPO (arXiv:2503.20783), so very easy and very hard problems do not weigh
    more than the others. If all rewards are equal, the advantages are 0.

    rewards_S: [S] the rewards of one group. Returns [S] float32.
    """
    rewards = np.asarray(rewards_S, dtype=np.float64)
    if rewards.size == 0 or np.ptp(rewards) <= NO_SIGNAL:
        return np.zeros(rewards.shape, dtype=np.float32)
    centred = rewards - rewards.mean()
    advantages_S: Float32Array = (centred / rewards.std() if normalize else centred).astype(np.float32)
    return advantages_S


class LossSums(NamedTuple):
    """Sums over trained tokens, as float64 scalars, which can be added over micro-batches, minibatches and ranks."""

    tokens: Tensor
    clipped: Tensor  # tokens whose ratio was clipped
    kl: Tensor  # KL(policy that sampled || policy), k3
    kl_reference: Tensor  # KL(policy || reference), k3
    gap: Tensor  # |engine's logprob - trainer's logprob|
    truncated: Tensor  # tokens whose importance weight reached the cap


class PolicyLoss(NamedTuple):
    """The loss of one micro-batch and its statistics.

    loss: scalar float32, to be summed over micro-batches and ranks. largest_gap: scalar, the largest logprob gap.
    """

    loss: Tensor
    sums: LossSums
    largest_gap: Tensor


def log_ratio(numerator_BT: Tensor, denominator_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return log(numerator / denominator) of logprobs: [B, T] float32.

    It is 0 where the mask is False, and at most MAX_LOG_RATIO in size, so that its exponential is finite.
    """
    difference_BT = torch.where(mask_BT, numerator_BT.float() - denominator_BT.float(), 0.0)
    return difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def k3(log_ratio_BT: Tensor) -> Tensor:
    """Return the k3 estimate of KL(p || q) for tokens drawn from p, given log(q / p).

    It is unbiased, has a low variance, and is never negative (Schulman, "Approximating KL divergence", 2020; the KL
    term of arXiv:2402.03300, equation 4).
    """
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def importance_weights(old_BT: Tensor, engine_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """Return min(trainer's / engine's probability, cap): [B, T] float32, without gradient.

    Engine and trainer compute the same policy by different kernels, or the engine had older weights. The weight
    corrects the expectation for this, and the cap bounds the variance (truncated importance sampling: Ionides 2008;
    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return log_ratio(old_BT, engine_BT, mask_BT).exp().clamp(max=cap).detach()


def masked_average(
    values_BT: Tensor, mask_BT: Tensor, average: str, normalizer: float, tokens_B: Tensor | None = None
) -> Tensor:
    """Return this micro-batch's share of the average over all micro-batches and ranks, a scalar.

    average: `token` weighs all tokens equally (DAPO, arXiv:2503.14476); `sequence` averages over the tokens of a
    sample, then over samples (GRPO). normalizer: the number of trained tokens for `token`, and of samples with a
    trained token for `sequence`. It counts all micro-batches of all ranks, so the shares add up to the exact average.
    tokens_B: the trained tokens of the sample that each row belongs to, if a sample may have several rows.
    """
    kept_BT = torch.where(mask_BT, values_BT, 0.0)
    if average == "token":
        return kept_BT.sum() / normalizer
    tokens_B = mask_BT.sum(dim=1) if tokens_B is None else tokens_B
    return (kept_BT.sum(dim=1) / tokens_B.clamp(min=1)).sum() / normalizer


def policy_loss(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    engine_BT: Tensor,
    reference_BT: Tensor | None,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    config: LossConfig,
    normalizer: float,
    tokens_B: Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped policy loss (PPO, arXiv:1707.06347) with GRPO's advantages and KL term.

    logprobs_BT: [B, T] the policy's logprobs, with gradient. old_BT: those before this step's first update, without
    gradient. engine_BT: the engine's at sampling. reference_BT: the reference model's; needed if `kl_coefficient` is
    above 0. mask_BT: [B, T] bool, the trained tokens. advantages_B: [B]. normalizer, tokens_B: as in `masked_average`.
    """
    ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    advantages_B1 = advantages_B.float().unsqueeze(1)
    loss_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    truncated_BT = torch.zeros_like(mask_BT)
    if config.importance_cap is not None:
        weights_BT = importance_weights(old_BT, engine_BT, mask_BT, config.importance_cap)
        loss_BT = weights_BT * loss_BT
        truncated_BT = weights_BT >= config.importance_cap
    kl_reference_BT = torch.zeros_like(loss_BT)
    if reference_BT is not None:
        kl_reference_BT = k3(log_ratio(reference_BT, logprobs_BT, mask_BT))
        loss_BT = loss_BT + config.kl_coefficient * kl_reference_BT
    loss = masked_average(loss_BT, mask_BT, config.average, normalizer, tokens_B)

    with torch.no_grad():
        gap_BT = torch.where(mask_BT, (engine_BT.float() - old_BT.float()).abs(), 0.0)
        stopped_BT = torch.where(advantages_B1 > 0, ratio_BT > clipped_BT, ratio_BT < clipped_BT) & (advantages_B1 != 0)
        kl_BT = k3(log_ratio(logprobs_BT, engine_BT, mask_BT))
        sums = LossSums(
            tokens=mask_BT.sum().double(),
            clipped=(stopped_BT & mask_BT).sum().double(),
            kl=kl_BT.double().sum(),
            kl_reference=kl_reference_BT.double().sum(),
            gap=gap_BT.double().sum(),
            truncated=(truncated_BT & mask_BT).sum().double(),
        )
        return PolicyLoss(loss, sums, gap_BT.max())


def supervised_loss(logprobs_BT: Tensor, mask_BT: Tensor, *, normalizer: float) -> Tensor:
    """Return the cross-entropy of the trained tokens, averaged over tokens. Arguments as in `policy_loss`."""
    return masked_average(-logprobs_BT, mask_BT, "token", normalizer)
