"""What a request's own output and settings change in its logits: bias, penalties and the least number of tokens.

The order is that of vLLM: the bias, the least number of tokens, the repetition penalty, and the other penalties.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from millrace.types import SamplingParams


class LogitChanges:
    """The changes to the logits of one request.

    The repetition penalty counts the prompt and the output, as in transformers and vLLM. The other penalties count the
    output, which begins with the `continued` tokens of earlier calls.
    """

    def __init__(
        self, sampling: SamplingParams, prompt: Sequence[int], continued: Sequence[int], stop: Collection[int]
    ) -> None:
        self._sampling = sampling
        self._prompt = set(prompt)
        self._output = Counter(continued)
        self._stop = sorted(stop)

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        """Return whether a request with this sampling changes its logits."""
        return sampling.penalizes or bool(sampling.logit_bias) or sampling.min_new_tokens > 0

    def count(self, token: int) -> None:
        """Count a sampled token."""
        self._output[token] += 1

    @torch.inference_mode()
    def apply(self, logits_V: torch.Tensor, made: int) -> None:
        """Change the logits in place, after `made` tokens of this call."""
        sampling = self._sampling
        if sampling.logit_bias:
            logits_V[list(sampling.logit_bias)] += _tensor(list(sampling.logit_bias.values()), logits_V)
        if made < sampling.min_new_tokens:
            logits_V[self._stop] = float("-inf")
        if sampling.repetition_penalty != 1.0:
            seen = list(self._prompt | self._output.keys())
            logits = logits_V[seen]
            scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
            logits_V[seen] = scaled
        if self._output and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = _tensor(list(self._output.values()), logits_V)
            logits_V[list(self._output)] -= counts * sampling.frequency_penalty + sampling.presence_penalty


def _tensor(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)
