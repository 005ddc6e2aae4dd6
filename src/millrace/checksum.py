"""Checksums that compare an engine's weights with the weights that were sent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

SAMPLE_BLOCKS, SAMPLE_WIDTH = 128, 64
SAMPLE = SAMPLE_BLOCKS * SAMPLE_WIDTH  # elements of a tensor
SAMPLED_TOGETHER = 256  # tensors


class Checksum:
    """The XXH3-64 checksum of a tensor's bytes in row-major order, computed piece by piece.

    It runs at about memory bandwidth, so it is always on. It detects damaged and wrong tensors. It is not a
    cryptographic hash, so it does not detect forged ones.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        self._digest.update(data)

    def hexdigest(self) -> str:
        """Return the checksum of the bytes so far as 16 hex digits."""
        return self._digest.hexdigest()


def checksum(data: memoryview) -> str:
    """Return the checksum of a whole tensor's bytes, as 16 hex digits."""
    digest = Checksum()
    digest.update(data)
    return digest.hexdigest()


def tensor_checksum(tensor: "torch.Tensor") -> str:
    """Return the checksum of a contiguous tensor on the CPU, as 16 hex digits."""
    import torch

    flat = tensor.as_strided((tensor.numel(),), (1,))  # torch calls one element contiguous, whatever its stride is
    return checksum(flat.view(torch.uint8).numpy().data)


def sampled_checksums(tensors: "Sequence[torch.Tensor]") -> list[str]:
    """Return a checksum of each tensor as 32 hex digits, computed on the tensors' device.

    tensors: contiguous, of any dtype, all on one device.

    At most 8,192 elements of a tensor are read, as integers: all of them, or 128 evenly spread blocks of 64, which
    include the first and the last. The checksum is their sum and their sum weighted by position, both modulo 2^64. It
    distinguishes weight versions, and detects tensors that were not written, written in part or written to the wrong
    place. It may miss a single changed element of a large tensor.
    """
    import torch

    integer_dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    alike: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((integer_dtypes[tensor.itemsize], tensor.numel() > SAMPLE), []).append(index)

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
    return ["".join(f"{number & (2**64 - 1):016x}" for number in sums[index]) for index in range(len(tensors))]
