"""Sample tokens from logits, for a whole batch at once.

Every request has its own stream of uniform random numbers, computed from its seed and the number of tokens it has
drawn. So its tokens do not depend on the rest of the batch, and a retracted request continues with the same stream.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LANE = np.dtype(
    [
        ("token", np.int64),  # the last one sampled, which is the next input
        ("stream", np.uint64),
        ("drawn", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int64),
        ("min_p", np.float32),
    ]
)
"""The state of each running request that sampling needs. A request's row is its KV slot."""

Lanes = NDArray[np.void]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stream_key(seed: int, index: int) -> int:
    """Return the 64-bit key of the random stream of sample number `index` of a request with this seed."""
    return _mix(_mix(seed & _MASK) + index)


def uniforms(streams_B: NDArray[np.uint64], drawn_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each row: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of a counter.

    It uses the upper 52 bits, not 53, so that the number times a total always rounds below that total.
    """
    z = streams_B + (drawn_B + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    uniforms_B: NDArray[np.float64] = (z >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return uniforms_B


@torch.inference_mode()
def sample(logits_BV: torch.Tensor, lanes: Lanes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sample a token for each row. Temperature 0 takes the most likely token.

    logits_BV: float32. Returns tokens [B] and their logprobs [B]. The logprobs are those of the temperature-scaled
    distribution over the whole vocabulary, before top-k, top-p and min-p. For them, temperature 0 counts as 1.
    """
    temperatures = lanes["temperature"]
    greedy = temperatures == 0
    scale = np.where(greedy, np.float32(1), temperatures)
    if (scale != 1).any():
        logits_BV = logits_BV / _to(scale, logits_BV)[:, None]
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    tokens_B = _draw(logprobs_BV, greedy, lanes)
    picked_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    if logits_BV.device.type == "cpu":
        return tokens_B.numpy(), picked_B.numpy()
    both = torch.stack((tokens_B.double(), picked_B.double())).cpu().numpy()  # one transfer, one wait for the device
    return both[0].astype(np.int64), both[1].astype(np.float32)


def _draw(logprobs_BV: torch.Tensor, greedy: NDArray[np.bool_], lanes: Lanes) -> torch.Tensor:
    """Return the tokens [B]: the argmax of greedy rows, and samples of the others, filtered if requested."""
    if greedy.all():
        return logprobs_BV.argmax(dim=-1)
    uniforms_B = _to(uniforms(lanes["stream"], lanes["drawn"]), logprobs_BV)
    probs_BV = logprobs_BV.exp()
    tokens_B = _invert(probs_BV, uniforms_B)
    filtered = ((lanes["top_k"] > 0) | (lanes["top_p"] < 1) | (lanes["min_p"] > 0)) & ~greedy
    if filtered.any():
        rows = _to(np.flatnonzero(filtered), logprobs_BV)
        tokens_B[rows] = _draw_filtered(probs_BV[rows], uniforms_B[rows], lanes[filtered])
    if greedy.any():
        tokens_B = torch.where(_to(greedy, logprobs_BV), logprobs_BV.argmax(dim=-1), tokens_B)
    return tokens_B


def _draw_filtered(probs_FV: torch.Tensor, uniforms_F: torch.Tensor, lanes: Lanes) -> torch.Tensor:
    """Sample [F] tokens with top-k, top-p (Holtzman et al., arXiv:1904.09751) and min-p (Nguyen et al.,
    arXiv:2407.01082). As in SGLang, each filter applies to the full distribution. The most likely token always passes.
    """
    ordered_FV, order_FV = probs_FV.sort(dim=-1, descending=True, stable=True)
    before_FV = ordered_FV.double().cumsum(dim=-1) - ordered_FV
    top_k = np.where(lanes["top_k"] > 0, lanes["top_k"], probs_FV.shape[1])
    top_p = np.where(lanes["top_p"] < 1, lanes["top_p"], np.inf)
    ranks_V = torch.arange(probs_FV.shape[1], device=probs_FV.device)
    keep_FV = ranks_V < _to(top_k, probs_FV)[:, None]
    keep_FV &= before_FV < _to(top_p, probs_FV)[:, None]
    keep_FV &= ordered_FV >= _to(lanes["min_p"], probs_FV)[:, None] * ordered_FV[:, :1]
    keep_FV[:, 0] = True
    drawn_F = _invert(ordered_FV * keep_FV, uniforms_F)
    return order_FV.gather(1, drawn_F[:, None])[:, 0]


def _invert(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Return the index [B] at which each row's cumulative sum passes its uniform number.

    An index of weight 0 is never drawn. If the weights are NaN (a broken model), the last index is drawn.
    """
    sums_BV = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    passed_B = torch.searchsorted(sums_BV, uniforms_B[:, None] * sums_BV[:, -1:], right=True)[:, 0]
    return passed_B.clamp(max=weights_BV.shape[1] - 1)


def _to(array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)


def _mix(z: int) -> int:
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
