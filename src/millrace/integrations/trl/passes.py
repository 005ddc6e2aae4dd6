"""Forward passes of a trainer's model with less padding than TRL's batches have."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from millrace.train.batch import plan_microbatches

Scores = tuple[Tensor, Tensor | None, Tensor | None]  # [B, C] logprobs, [B, C] entropies, auxiliary loss


def shorten_passes(trainer: GRPOTrainer, tokens_per_pass: int) -> None:
    """Make a trainer compute logprobs and entropies in passes over samples of similar length, cut to the longest.

    TRL pads all samples of a step to the longest one. Loss and gradients stay the same but for rounding. With several
    ranks, all must run as many passes, so the samples of a pass are as many as TRL's, and `tokens_per_pass` is not
    used. A batch stays as it is if there is an auxiliary loss, which depends on the batch, or an input beside tokens.
    """
    if trainer.pad_to_multiple_of is None:  # otherwise the user wants few different shapes
        several = trainer.accelerator.num_processes > 1
        trainer._get_per_token_logps_and_entropies = ShortPasses(
            trainer._get_per_token_logps_and_entropies, None if several else tokens_per_pass
        )


class ShortPasses:
    """TRL's `_get_per_token_logps_and_entropies`, called for a few samples at a time.

    score: TRL's method. tokens_per_pass: how many tokens a pass has at most; None if only its samples are limited. The
    ends of prompts are aligned, so there is some padding beside that.
    """

    def __init__(self, score: Callable[..., Scores], tokens_per_pass: int | None) -> None:
        self._score, self._tokens_per_pass = score, tokens_per_pass

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> Scores:
        """Return what TRL's method returns."""
        extra = {name: value for name, value in others.items() if value is not None}
        if extra or compute_aux_loss:
            return self._score(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **extra
            )
        begins, ends = _extents(attention_mask)
        rows = list(self._passes((ends - begins).tolist(), batch_size or len(input_ids)))
        parts = [
            self._part(
                model, input_ids[own], attention_mask[own], logits_to_keep,
                int(begins[own].min()), int(ends[own].max()), compute_entropy,
            )
            for own in rows
        ]  # fmt: skip
        order = torch.tensor([row for own in rows for row in own], device=input_ids.device).argsort()
        logprobs = torch.cat([logprobs for logprobs, _ in parts])[order]
        if not compute_entropy:
            return logprobs, None, None
        return logprobs, torch.cat([entropies for _, entropies in parts if entropies is not None])[order], None

    def _passes(self, lengths: list[int], most: int) -> Iterator[list[int]]:
        """Yield the samples of each pass, at most `most`."""
        width = max(lengths)
        for own in plan_microbatches(lengths, self._tokens_per_pass or width * len(lengths)):
            yield from (own[start : start + most] for start in range(0, len(own), most))

    def _part(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int, begin: int, end: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the scores of a few samples, of whose columns only `begin:end` are computed."""
        width = ids.shape[1]
        end = max(end, width - keep + 1)  # at least one column is scored
        cut = width - end
        logprobs, entropies, _ = self._score(
            model, ids[:, begin:end], mask[:, begin:end], keep - cut, None, compute_entropy=entropy
        )

        def whole(scores: Tensor) -> Tensor:
            return torch.nn.functional.pad(scores, (0, cut))

        return whole(logprobs), None if entropies is None else whole(entropies)


def _extents(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column of each row that is not padding, and the one after the last."""
    real = mask.to(torch.int8)
    return real.argmax(dim=1), mask.shape[1] - real.flip(1).argmax(dim=1)
