"""The training step: it updates the policy's weights on samples and returns statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from millrace.config.models import TrainConfig
from millrace.errors import MillraceError
from millrace.train.batch import NOTHING, Microbatch, TrainSample, collate, make_microbatches, plan_minibatches
from millrace.train.loss import LossSums, policy_loss, supervised_loss
from millrace.train.optimizer import apply_gradients, global_grad_norm, learning_rate, make_optimizer
from millrace.train.policy import Policy
from millrace.train.world import World
from millrace.types import Float32Array


class TrainingError(MillraceError):
    """A training step failed. The message names it. Its failed update was not applied to the weights."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """The statistics of one step over all ranks. Per-token values are means over the trained tokens; 0 if none."""

    step: int  # counted from 1
    loss: float  # the mean over the minibatches
    kl: float  # KL(policy that sampled || policy), by k3: how far off-policy the step was
    kl_reference: float  # KL(policy || reference), by k3; 0 without a reference
    clip_fraction: float  # the share of tokens whose ratio was clipped
    logprob_gap: float  # |engine's logprob - trainer's|, in nats
    largest_logprob_gap: float
    truncated_fraction: float  # the share of importance weights that reached the cap
    entropy: float  # in nats
    grad_norm: float  # before clipping; the mean over the minibatches
    lr: float
    tokens: int  # trained ones
    microbatches: int  # forward-backward passes of this rank
    # Of each of this rank's samples, the policy's before the step's first update: [T] float32; 0 where loss_mask is
    # False.
    logprobs: tuple[Float32Array, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SupervisedStats:
    """The statistics of one supervised step over all ranks. loss: cross-entropy, in nats a token."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """The samples of one optimizer step. normalizer: of the loss, over all ranks; 0 skips the step."""

    microbatches: list[Microbatch]
    normalizer: float


@dataclass(slots=True)
class _Tally:
    """The sums of a step, kept on the device, so that the step waits for it once and not for every micro-batch."""

    device: torch.device
    sums: Tensor = field(init=False)  # LossSums and the entropy
    largest_gap: Tensor = field(init=False)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    logprobs: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)  # (the samples' places, [B, T])

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(LossSums._fields) + 1, dtype=torch.float64, device=self.device)
        self.largest_gap = torch.zeros((), device=self.device)

    def add(self, sums: LossSums, entropy: Tensor, largest_gap: Tensor) -> None:
        self.sums += torch.stack([*sums, entropy])
        self.largest_gap = torch.maximum(self.largest_gap, largest_gap)

    def keep(self, batch: Microbatch, old_BT: Tensor) -> None:
        """Keep the logprobs of a micro-batch, on the device: a copy to the CPU would wait for it."""
        self.logprobs.append((batch.places, torch.where(batch.mask_BT, old_BT.float(), 0.0)))

    def logprobs_of(self, samples: Sequence[TrainSample]) -> tuple[Float32Array, ...]:
        """Return the logprobs of each sample, on the CPU."""
        of_samples = [np.zeros(sample.token_ids.size, np.float32) for sample in samples]
        for places, logprobs_BT in self.logprobs:
            for place, logprobs_T in zip(places, logprobs_BT.cpu().numpy(), strict=False):  # blank rows come last
                of_samples[place][:] = logprobs_T[: of_samples[place].size]
        return tuple(of_samples)

    def stats(
        self, world: World, samples: Sequence[TrainSample], *, step: int, lr: float, microbatches: int
    ) -> StepStats:
        *values, entropy = world.sum(self.sums).tolist()
        sums = dict(zip(LossSums._fields, values, strict=True))
        tokens = max(1.0, sums["tokens"])
        updates = max(1, len(self.losses))
        return StepStats(
            step=step,
            loss=sum(self.losses) / updates,
            kl=sums["kl"] / tokens,
            kl_reference=sums["kl_reference"] / tokens,
            clip_fraction=sums["clipped"] / tokens,
            logprob_gap=sums["gap"] / tokens,
            largest_logprob_gap=world.max(self.largest_gap).item(),
            truncated_fraction=sums["truncated"] / tokens,
            entropy=entropy / tokens,
            grad_norm=sum(self.grad_norms) / updates,
            lr=lr,
            tokens=int(sums["tokens"]),
            microbatches=microbatches,
            logprobs=self.logprobs_of(samples),
        )


class Trainer:
    """Trains a policy with AdamW. `step` counts all steps, and determines the learning rate.

    For a supervised warm-up, create a second trainer on the same policy, with the optimizer settings and the number of
    steps of the warm-up. Then the moments and the schedule start from the beginning with the reinforcement. With
    `kl_coefficient` above 0, the reference is the policy before its first reinforcement step.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.world = policy.world
        self.optimizer = make_optimizer(policy.parameters().values(), config)
        self.step = 0

    def ensure_reference(self) -> None:
        """Copy the policy as the reference if the loss needs one and there is none. Collective."""
        if self.config.loss.kl_coefficient > 0 and self.policy.reference is None:
            self.policy.take_reference()

    def train_step(self, samples: Sequence[TrainSample], temperature: float) -> StepStats:
        """Take one reinforcement step and return its statistics. Collective.

        samples: this rank's, sampled at `temperature`; may be empty. Raises TrainingError if the loss or the gradients
        are not finite, ValueError if a token is not in the vocabulary, and DataError if the placeholders of a sample do
        not match its images.
        """
        self.ensure_reference()
        minibatches = self._minibatches(samples, self.config.minibatches, self.config.loss.average)
        old = self._old_logprobs(minibatches, temperature)
        lr = learning_rate(self.config, self.step, self.config.steps)
        tally = _Tally(self.world.device)
        for minibatch, old_logprobs in zip(minibatches, old, strict=True):
            if minibatch.normalizer == 0:
                continue
            loss = torch.zeros((), device=self.world.device)
            for microbatch, old_BT in zip(minibatch.microbatches, old_logprobs, strict=True):
                loss += self._reinforce(microbatch, old_BT, temperature, minibatch.normalizer, tally)
            global_loss, grad_norm = self._update(loss, lr)
            tally.losses.append(global_loss)
            tally.grad_norms.append(grad_norm)
        self.step += 1
        passes = sum(len(minibatch.microbatches) for minibatch in minibatches)
        return tally.stats(self.world, samples, step=self.step, lr=lr, microbatches=passes)

    def supervised_step(self, samples: Sequence[TrainSample]) -> SupervisedStats:
        """Take one supervised step, with one update, and return its statistics. Collective.

        It raises the probability of the trained tokens at temperature 1. samples: from `supervised_sample`. Raises the
        errors of `train_step`.
        """
        [minibatch] = self._minibatches(samples, 1, "token")
        lr = learning_rate(self.config, self.step, self.config.steps)
        global_loss, grad_norm = 0.0, 0.0
        if minibatch.normalizer > 0:
            loss = torch.zeros((), device=self.world.device)
            for microbatch in minibatch.microbatches:
                batch = microbatch.to(self.world.device)
                logprobs_BT = self.policy.token_logprobs(batch.token_ids_BT, 1.0, batch.images).logprobs_BT
                loss += self._backward(supervised_loss(logprobs_BT, batch.mask_BT, normalizer=minibatch.normalizer))
            global_loss, grad_norm = self._update(loss, lr)
        self.step += 1
        return SupervisedStats(self.step, global_loss, grad_norm, lr, int(minibatch.normalizer))

    def _minibatches(self, samples: Sequence[TrainSample], count: int, average: str) -> list[_Minibatch]:
        """Return this rank's samples for each optimizer step, with the same number of micro-batches on every rank."""
        vocabulary = self.policy.vocab_size
        for sample in samples:
            low, high = int(sample.token_ids.min()), int(sample.token_ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(f"a sample has token ids from {low} to {high}; the model has 0 to {vocabulary - 1}")
            self.policy.require_places(sample)
        device = self.world.device
        self.world.make_current()
        dealt = plan_minibatches(len(samples), count)
        shares = [[samples[i] for i in indices] for indices in dealt]
        blank, size = self.policy.blank_sample(), self.config.tokens_per_microbatch
        plans = [make_microbatches(share, size, blank, places) for share, places in zip(shares, dealt, strict=True)]
        longest = self.world.max(torch.tensor([float(len(plan)) for plan in plans], device=device)).tolist()
        for plan, length in zip(plans, longest, strict=True):
            # A rank without samples left must join every gather of weights and every reduction of gradients.
            plan.extend(collate([blank or NOTHING]) for _ in range(int(length) - len(plan)))
        weights = [sum(s.trained_tokens if average == "token" else s.share for s in share) for share in shares]
        normalizers = self.world.sum(torch.tensor(weights, dtype=torch.float64, device=device)).tolist()
        return [_Minibatch(plan, normalizer) for plan, normalizer in zip(plans, normalizers, strict=True)]

    @torch.no_grad()
    def _old_logprobs(self, minibatches: Sequence[_Minibatch], temperature: float) -> list[list[Tensor | None]]:
        """Return the logprobs of each micro-batch before the step's first update.

        None stands for the current logprobs: the first minibatch comes before any update, so it needs no extra pass.
        """
        old: list[list[Tensor | None]] = [[None for _ in minibatches[0].microbatches]]
        for minibatch in minibatches[1:]:
            on_device = (batch.to(self.world.device) for batch in minibatch.microbatches)
            old.append(
                [
                    self.policy.token_logprobs(one.token_ids_BT, temperature, one.images, one.experts_BTLK).logprobs_BT
                    for one in on_device
                ]
            )
        return old

    def _reinforce(
        self, microbatch: Microbatch, old_BT: Tensor | None, temperature: float, normalizer: float, tally: _Tally
    ) -> Tensor:
        """Run the forward and backward pass of one micro-batch. Returns its share of the loss, without gradient."""
        batch = microbatch.to(self.world.device)
        logprobs_BT, entropy_BT = self.policy.token_logprobs(
            batch.token_ids_BT, temperature, batch.images, batch.experts_BTLK
        )
        reference_BT = None
        if self.config.loss.kl_coefficient > 0:
            reference_BT = self.policy.reference_logprobs(batch.token_ids_BT, temperature, batch.images)
        if old_BT is None:  # before the first update it is the current one: the ratio is 1, but its gradient is not 0
            old_BT = logprobs_BT.detach()
        tally.keep(batch, old_BT)
        result = policy_loss(
            logprobs_BT,
            old_BT,
            batch.engine_logprobs_BT,
            reference_BT,
            batch.mask_BT,
            batch.advantages_B,
            config=self.config.loss,
            normalizer=normalizer,
            tokens_B=batch.tokens_B,
        )
        entropy = torch.where(batch.mask_BT, entropy_BT, 0.0).double().sum()
        tally.add(result.sums, entropy, result.largest_gap)
        return self._backward(result.loss)

    def _backward(self, loss: Tensor) -> Tensor:
        # FSDP averages gradients over ranks, but each loss is a share of the global average, so they must be summed.
        (loss * self.world.size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self, loss: Tensor, lr: float) -> tuple[float, float]:
        """Take an optimizer step. Returns the global loss and gradient norm.

        They are the same on all ranks, so the ranks agree on whether to take the step.
        """
        grad_norm = global_grad_norm(self.policy.parameters().values())
        figures = self.world.sum(loss).item(), grad_norm.item()
        if not all(math.isfinite(figure) for figure in figures):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"step {self.step + 1}: loss {figures[0]} and gradient norm {figures[1]} must be finite; the update "
                "was not applied. Look for extreme rewards or logprobs in its samples, or lower train.lr"
            )
        apply_gradients(self.optimizer, grad_norm=grad_norm, max_grad_norm=self.config.max_grad_norm, lr=lr)
        return figures
