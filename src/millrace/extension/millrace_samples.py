"""Sampled checksums of tensors. The trainer computes them of what it sends, and the engines of what they hold.

The engines' interpreters run this file too, so it imports nothing of Millrace.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE_BLOCKS, SAMPLE_WIDTH = 128, 64
SAMPLE = SAMPLE_BLOCKS * SAMPLE_WIDTH  # elements of a tensor
SAMPLED_TOGETHER = 256  # tensors


def sampled_checksums(tensors: "Sequence[torch.Tensor]") -> list[str]:
    """Return a checksum of each tensor as 32 hex digits, computed on the tensors' device.

    tensors: contiguous, of any dtype, all on one device.

    At most 8,192 elements of a tensor are read, as integers: all of them, or 128 evenly spread blocks of 64, which
    include the first and the last. The checksum is their sum and their sum weighted by position, both modulo 2^64. It
    distinguishes weight versions, and detects tensors that were not written, written in part or written to the wrong
    place. It may miss a single changed element of a large tensor.
    """
    import torch

    alike: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((integer_dtype(tensor.itemsize), tensor.numel() > SAMPLE), []).append(index)

    def blocks(tensor: torch.Tensor) -> torch.Tensor:
        step = (tensor.numel() - SAMPLE_WIDTH) // (SAMPLE_BLOCKS - 1)
        return tensor.as_strided((SAMPLE_BLOCKS, SAMPLE_WIDTH), (step, 1))

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((tensor.numel(),), (1,))

    # Tensors are batched to make few torch calls: there are hundreds of tensors, and the engine waits meanwhile.
    sums: dict[int, list[int]] = {}
    with torch.no_grad():
        for (kind, large), indices in alike.items():
            for start in range(0, len(indices), SAMPLED_TOGETHER):
                batch = indices[start : start + SAMPLED_TOGETHER]
                views = [(blocks if large else whole)(tensors[index]).view(kind) for index in batch]
                stacked = torch.stack(views) if large else torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
                samples_NE = stacked.flatten(1).to(torch.int64)
                positions_E = torch.arange(1, samples_NE.shape[1] + 1, device=samples_NE.device)
                pairs = torch.stack((samples_NE.sum(1), (samples_NE * positions_E).sum(1)), 1).tolist()
                sums.update(zip(batch, pairs, strict=True))
    return [hexadecimal(sums[index]) for index in range(len(tensors))]


def integer_dtype(itemsize: int) -> "torch.dtype":
    """Return the dtype of integers of this many bytes. As integers, elements that are NaN can be compared."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]


def hexadecimal(sums: Iterable[int]) -> str:
    """Return 16 hex digits for each sum."""
    return "".join(f"{number & (2**64 - 1):016x}" for number in sums)
