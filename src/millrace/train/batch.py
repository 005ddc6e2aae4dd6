"""Samples as padded tensors. Pure functions of the samples' lengths decide which samples go together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millrace.rollout.sample import Group
from millrace.train.loss import group_advantages
from millrace.types import ExpertArray, Float32Array


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One conversation to train on, with its advantage.

    token_ids: [T] integers. loss_mask: [T] bool, True for tokens to train on; False at position 0, which has no
    prediction. logprobs: [T] float32, the engine's at the sampling temperature; used only where loss_mask is True.
    images: the contents of image files; `token_ids` has a run of placeholders for each, as the engine read them.
    of_tokens: the trained tokens of the whole sample that this is a sequence of; None if it is the whole.
    routed_experts: [N, L, K] integers, N <= T: the experts that the engine routed the first N tokens to. Raises
    ValueError if shapes or dtypes don't match.
    """

    token_ids: NDArray[np.integer]
    loss_mask: NDArray[np.bool_]
    logprobs: Float32Array
    advantage: float
    images: tuple[bytes, ...] = field(default=(), repr=False)
    of_tokens: int | None = None
    routed_experts: ExpertArray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shapes = {self.token_ids.shape, self.loss_mask.shape, self.logprobs.shape}
        if len(shapes) != 1 or self.token_ids.ndim != 1 or self.token_ids.size == 0:
            raise ValueError(
                f"a sample's token_ids {self.token_ids.shape}, loss_mask {self.loss_mask.shape} and logprobs "
                f"{self.logprobs.shape} must be vectors of one length, of one token at least"
            )
        if self.loss_mask.dtype != np.bool_:
            raise ValueError(f"loss_mask must be bool, not {self.loss_mask.dtype}")
        if self.loss_mask[0]:
            raise ValueError("the first token of a sample has no prediction; its loss_mask must be False")
        routed = self.routed_experts
        if routed is not None and (routed.ndim != 3 or len(routed) > self.token_ids.size):
            raise ValueError(
                f"routed_experts must be [N, L, K] with at most {self.token_ids.size} tokens, not {routed.shape}"
            )

    @property
    def trained_tokens(self) -> int:
        """The number of tokens to train on."""
        return int(self.loss_mask.sum())

    @property
    def share(self) -> float:
        """Its share of the sample's trained tokens: 1 if it is the whole; 0 without any."""
        return 0.0 if not self.trained_tokens else self.trained_tokens / (self.of_tokens or self.trained_tokens)


def sequences_of(group: Group, *, normalize: bool) -> list[TrainSample]:
    """Return the token sequences of a group's samples, all of which are finished, with their advantages.

    A sample counts once in the group's baseline however many sequences it has, and each of them has its advantage.
    normalize: as in `group_advantages`.
    """
    advantages = group_advantages([sample.reward for sample in group.samples], normalize=normalize)
    return [
        TrainSample(
            np.asarray(one.token_ids, dtype=np.int64),
            one.loss_mask,
            one.logprobs,
            float(advantage),
            one.images,
            sample.generated_tokens if sample.branches else None,
            one.routed_experts,
        )
        for sample, advantage in zip(group.samples, advantages, strict=True)
        for one in sample.sequences
    ]


def supervised_sample(token_ids: Sequence[int], loss_mask: Sequence[bool], images: Sequence[bytes] = ()) -> TrainSample:
    """Return a sample for supervised training. Its logprobs are zeros, which `supervised_step` does not use.

    token_ids, loss_mask: [T], and images, as in TrainSample, which raises ValueError.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    mask, logprobs = np.asarray(loss_mask, dtype=np.bool_), np.zeros(ids.shape, dtype=np.float32)
    return TrainSample(ids, mask, logprobs, 1.0, tuple(images))


@dataclass(frozen=True, slots=True)
class Microbatch:
    """The samples of one forward and backward pass, padded on the right to the longest of them.

    token_ids_BT: int64. engine_logprobs_BT: float32. mask_BT: bool. advantages_B: float32. tokens_B: int64, the trained
    tokens of the sample that each row belongs to. All on one device. images: the contents of the image files of all
    samples, in the order of their placeholders in `token_ids_BT`. experts_BTLK: int16, the routed experts, -1 where
    they are not known; None if they are known of no token. There is no attention mask: in a causal model no token
    attends to the padding after it, and mask_BT excludes the padding from the loss. places: of the first rows, the
    places of their samples in what was planned; later rows are blank.
    """

    token_ids_BT: Tensor
    engine_logprobs_BT: Tensor
    mask_BT: Tensor
    advantages_B: Tensor
    tokens_B: Tensor
    images: tuple[bytes, ...] = field(default=(), repr=False)
    experts_BTLK: Tensor | None = None
    places: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Microbatch":
        """Return the micro-batch on a device."""
        return Microbatch(
            self.token_ids_BT.to(device),
            self.engine_logprobs_BT.to(device),
            self.mask_BT.to(device),
            self.advantages_B.to(device),
            self.tokens_B.to(device),
            self.images,
            None if self.experts_BTLK is None else self.experts_BTLK.to(device),
            self.places,
        )


def plan_minibatches(samples: int, minibatches: int) -> list[list[int]]:
    """Return the sample indices of each minibatch, which is one optimizer step.

    Indices are dealt out in turn: the samples of a group are adjacent, so each minibatch gets some of every group.
    There are always `minibatches` lists; some are empty if there are fewer samples.
    """
    return [list(range(first, samples, minibatches)) for first in range(minibatches)]


def plan_microbatches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Return the indices of `lengths` for each micro-batch.

    The padded size of a micro-batch (samples times the longest length) is at most `tokens_per_microbatch`. A longer
    sample gets its own micro-batch. Samples are sorted by length, so there is little padding. The longest come first,
    so running out of GPU memory happens in the first micro-batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else None
        if current is not None and (len(current) + 1) * lengths[current[0]] <= tokens_per_microbatch:
            current.append(index)
        else:
            batches.append([index])
    return batches


def collate(samples: Sequence[TrainSample], places: Sequence[int] = ()) -> Microbatch:
    """Return samples as one padded micro-batch on the CPU. The padding is token 0, with mask False.

    places: as in Microbatch.
    """
    shape = (len(samples), max(sample.token_ids.size for sample in samples))
    token_ids = np.zeros(shape, dtype=np.int64)
    logprobs = np.zeros(shape, dtype=np.float32)
    mask = np.zeros(shape, dtype=np.bool_)
    for row, sample in enumerate(samples):
        length = sample.token_ids.size
        token_ids[row, :length] = sample.token_ids
        logprobs[row, :length] = np.where(sample.loss_mask, sample.logprobs, 0.0)
        mask[row, :length] = sample.loss_mask
    advantages = np.array([sample.advantage for sample in samples], dtype=np.float32)
    tokens = np.array([sample.of_tokens or sample.trained_tokens for sample in samples], dtype=np.int64)
    return Microbatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(logprobs),
        torch.from_numpy(mask),
        torch.from_numpy(advantages),
        torch.from_numpy(tokens),
        tuple(image for sample in samples for image in sample.images),
        _experts(samples, shape[1]),
        tuple(places),
    )


def _experts(samples: Sequence[TrainSample], length: int) -> Tensor | None:
    """Return the routed experts of samples, padded to a length: [B, length, L, K] int16; None if no sample has any.

    Raises ValueError if samples have different numbers of layers, or of experts a token.
    """
    known = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    if not known:
        return None
    shapes = {one.shape[1:] for one in known}
    if len(shapes) > 1:
        raise ValueError(f"the routed experts of the samples have different layers and experts: {sorted(shapes)}")
    experts = np.full((len(samples), length, *known[0].shape[1:]), -1, np.int16)
    for row, sample in zip(experts, samples, strict=True):
        if sample.routed_experts is not None:
            row[: len(sample.routed_experts)] = sample.routed_experts
    return torch.from_numpy(experts)


NOTHING = supervised_sample([0, 0], [False, False])


def make_microbatches(
    samples: Sequence[TrainSample],
    tokens_per_microbatch: int,
    blank: TrainSample | None = None,
    places: Sequence[int] | None = None,
) -> list[Microbatch]:
    """Return samples as micro-batches, planned by `plan_microbatches`.

    blank: a sample with an image and without trained tokens, which is added to micro-batches without images. places:
    of the samples, for the micro-batches; None numbers them.
    """
    places = range(len(samples)) if places is None else places
    plan = plan_microbatches([sample.token_ids.size for sample in samples], tokens_per_microbatch)
    batches = [[samples[i] for i in indices] for indices in plan]
    if blank is not None:
        batches = [batch if any(sample.images for sample in batch) else [*batch, blank] for batch in batches]
    return [collate(batch, [places[i] for i in indices]) for batch, indices in zip(batches, plan, strict=True)]
