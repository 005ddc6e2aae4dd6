"""One step of training: samples in, updated weights and figures out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.config.models import TrainConfig
from millrace.errors import MillraceError
from millrace.train.batch import Microbatch, TrainSample, empty_microbatch, make_microbatches, plan_minibatches
from millrace.train.loss import LossSums, policy_loss, supervised_loss
from millrace.train.optimizer import apply_gradients, global_grad_norm, learning_rate, make_optimizer
from millrace.train.policy import Policy
from millrace.train.world import World


class TrainingError(MillraceError):
    """A step can't be taken. The message names it. The update that failed was not made."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """The figures of one step over all ranks. Per-token ones are means over the trained tokens, 0 where none is."""

    step: int  # counted from 1
    loss: float  # the mean over the minibatches
    kl: float  # KL(policy that sampled || policy), by k3: how far off-policy the step was
    kl_reference: float  # KL(policy || reference), by k3; 0 without a reference
    clip_fraction: float  # of the tokens, how many the clip stopped
    logprob_gap: float  # |engine's logprob - trainer's|
    largest_logprob_gap: float
    truncated_fraction: float  # of the importance weights, how many the cap stopped
    entropy: float  # nats
    grad_norm: float  # before clipping; the mean over the minibatches
    lr: float
    tokens: int  # trained ones
    microbatches: int  # forward-backward passes of this rank


@dataclass(frozen=True, slots=True)
class SupervisedStats:
    """The figures of one supervised step over all ranks. loss: cross-entropy in nats a token."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """One optimizer step's worth. normalizer: what the loss is averaged over, on all ranks; 0 skips the step."""

    microbatches: list[Microbatch]
    normalizer: float


@dataclass(slots=True)
class _Tally:
    """What a step adds up on its device, so that it waits for the device once and not for every micro-batch."""

    device: torch.device
    sums: Tensor = field(init=False)  # LossSums and the entropy
    largest_gap: Tensor = field(init=False)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(LossSums._fields) + 1, dtype=torch.float64, device=self.device)
        self.largest_gap = torch.zeros((), device=self.device)

    def add(self, sums: LossSums, entropy: Tensor, largest_gap: Tensor) -> None:
        self.sums += torch.stack([*sums, entropy])
        self.largest_gap = torch.maximum(self.largest_gap, largest_gap)

    def stats(self, world: World, *, step: int, lr: float, microbatches: int) -> StepStats:
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
        )


class Trainer:
    """Trains a policy by AdamW. `step` counts the steps taken, of either kind; the learning rate follows it.

    For a supervised warm-up make a trainer of its own on the same policy, its config with the warm-up's optimizer and
    number of steps: moments and schedule then start anew with the reinforcement. With `kl_coefficient` above 0 the
    reference is the policy as it is before its first step of reinforcement.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.world = policy.world
        self.optimizer = make_optimizer(policy.parameters().values(), config)
        self.step = 0

    def ensure_reference(self) -> None:
        """Takes the reference if the loss needs one and there is none yet. Collective."""
        if self.config.loss.kl_coefficient > 0 and self.policy.reference is None:
            self.policy.take_reference()

    def train_step(self, samples: Sequence[TrainSample], temperature: float) -> StepStats:
        """One step of reinforcement on this rank's samples, which were sampled at `temperature`; other ranks bring
        their own, and a rank may have none. Collective.

        Raises TrainingError where loss or gradients are not finite, ValueError where a token is not in the vocabulary.
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
        return tally.stats(self.world, step=self.step, lr=lr, microbatches=passes)

    def supervised_step(self, samples: Sequence[TrainSample]) -> SupervisedStats:
        """One step of imitation, in one update: raises the probability of the trained tokens at temperature 1.
        Otherwise as `train_step`; see `supervised_sample`."""
        [minibatch] = self._minibatches(samples, 1, "token")
        lr = learning_rate(self.config, self.step, self.config.steps)
        global_loss, grad_norm = 0.0, 0.0
        if minibatch.normalizer > 0:
            loss = torch.zeros((), device=self.world.device)
            for microbatch in minibatch.microbatches:
                batch = microbatch.to(self.world.device)
                logprobs_BT = self.policy.token_logprobs(batch.token_ids_BT, 1.0).logprobs_BT
                loss += self._backward(supervised_loss(logprobs_BT, batch.mask_BT, normalizer=minibatch.normalizer))
            global_loss, grad_norm = self._update(loss, lr)
        self.step += 1
        return SupervisedStats(self.step, global_loss, grad_norm, lr, int(minibatch.normalizer))

    def _minibatches(self, samples: Sequence[TrainSample], count: int, average: str) -> list[_Minibatch]:
        """This rank's share of each optimizer step, in as many micro-batches as the rank with the most needs."""
        vocabulary = self.policy.vocab_size
        for sample in samples:
            low, high = int(sample.token_ids.min()), int(sample.token_ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(f"a sample has token ids from {low} to {high}; the model has 0 to {vocabulary - 1}")
        device = self.world.device
        self.world.make_current()
        shares = [[samples[i] for i in indices] for indices in plan_minibatches(len(samples), count)]
        plans = [make_microbatches(share, self.config.tokens_per_microbatch) for share in shares]
        longest = self.world.max(torch.tensor([float(len(plan)) for plan in plans], device=device)).tolist()
        for plan, length in zip(plans, longest, strict=True):
            plan.extend(empty_microbatch() for _ in range(int(length) - len(plan)))
        trained = [[sample.trained_tokens for sample in share] for share in shares]
        weights = [sum(tokens) if average == "token" else sum(n > 0 for n in tokens) for tokens in trained]
        normalizers = self.world.sum(torch.tensor(weights, dtype=torch.float64, device=device)).tolist()
        return [_Minibatch(plan, normalizer) for plan, normalizer in zip(plans, normalizers, strict=True)]

    @torch.no_grad()
    def _old_logprobs(self, minibatches: Sequence[_Minibatch], temperature: float) -> list[list[Tensor | None]]:
        """The logprobs of each micro-batch before the step's first update. None stands for the present ones: nothing
        has been updated when the first minibatch comes, so it needs no pass of its own."""
        old: list[list[Tensor | None]] = [[None for _ in minibatches[0].microbatches]]
        for minibatch in minibatches[1:]:
            on_device = (batch.token_ids_BT.to(self.world.device) for batch in minibatch.microbatches)
            old.append([self.policy.token_logprobs(ids_BT, temperature).logprobs_BT for ids_BT in on_device])
        return old

    def _reinforce(
        self, microbatch: Microbatch, old_BT: Tensor | None, temperature: float, normalizer: float, tally: _Tally
    ) -> Tensor:
        """Forward and backward of one micro-batch. Returns its share of the loss, without gradient."""
        batch = microbatch.to(self.world.device)
        logprobs_BT, entropy_BT = self.policy.token_logprobs(batch.token_ids_BT, temperature)
        reference_BT = None
        if self.config.loss.kl_coefficient > 0:
            reference_BT = self.policy.reference_logprobs(batch.token_ids_BT, temperature)
        result = policy_loss(
            logprobs_BT,
            # Before the first update the old policy is the present one: the ratio is 1, and its gradient is not 0.
            logprobs_BT.detach() if old_BT is None else old_BT,
            batch.engine_logprobs_BT,
            reference_BT,
            batch.mask_BT,
            batch.advantages_B,
            config=self.config.loss,
            normalizer=normalizer,
        )
        entropy = torch.where(batch.mask_BT, entropy_BT, 0.0).double().sum()
        tally.add(result.sums, entropy, result.largest_gap)
        return self._backward(result.loss)

    def _backward(self, loss: Tensor) -> Tensor:
        # FSDP averages gradients over ranks. Each loss is a share of the global average, so they have to be added.
        (loss * self.world.size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self, loss: Tensor, lr: float) -> tuple[float, float]:
        """Steps the optimizer. Returns the global loss and gradient norm: the same two figures on all ranks, which so
        agree on whether the step can be taken."""
        grad_norm = global_grad_norm(self.policy.parameters().values())
        figures = self.world.sum(loss).item(), grad_norm.item()
        if not all(math.isfinite(figure) for figure in figures):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"step {self.step + 1}: loss {figures[0]} and gradient norm {figures[1]} must be finite; the update "
                "was not made. Look for extreme rewards or logprobs in its samples, or lower train.lr"
            )
        apply_gradients(self.optimizer, grad_norm=grad_norm, max_grad_norm=self.config.max_grad_norm, lr=lr)
        return figures
