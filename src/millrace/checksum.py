"""The checksums by which an engine's weights are compared with what was sent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

SAMPLE_BLOCKS, SAMPLE_WIDTH = 128, 64
SAMPLE = SAMPLE_BLOCKS * SAMPLE_WIDTH  # elements of a tensor
SAMPLED_TOGETHER = 256  # tensors


class Checksum:
    """XXH3-64 of a tensor's bytes in row-major order, fed in pieces.

    It runs at about the memory's bandwidth: cheap enough to be always on. It tells a damaged or a wrong tensor from the
    right one; it is no defence against somebody who forges one.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        self._digest.update(data)

    def hexdigest(self) -> str:
        """16 hex digits."""
        return self._digest.hexdigest()


def checksum(data: memoryview) -> str:
    """The checksum of a whole tensor's bytes."""
    digest = Checksum()
    digest.update(data)
    return digest.hexdigest()


def tensor_checksum(tensor: "torch.Tensor") -> str:
    """The checksum of a contiguous tensor on the CPU."""
    import torch

    flat = tensor.as_strided((tensor.numel(),), (1,))  # torch calls one element contiguous whatever its stride
    return checksum(flat.view(torch.uint8).numpy().data)


def sampled_checksums(tensors: "Sequence[torch.Tensor]") -> list[str]:
    """Of each tensor (contiguous, of any dtype, all on one device), 32 hex digits made on the device that holds it.

    Up to 8,192 of its elements are taken as integers: all of them, or 128 blocks of 64 that are spread evenly, the
    first and the last among them. What is made of them is their sum, and their sum with each weighted by its place,
    both modulo 2^64. It tells a version from another, a tensor that was not written, or only in part, or to the wrong
    place; a single element that changed in a large tensor it may miss.
    """
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        elements = tensor.detach().as_strided((tensor.numel(),), (1,)).view(kinds[tensor.itemsize])
        if len(elements) <= SAMPLE:
            return torch.nn.functional.pad(elements.to(torch.int64), (0, SAMPLE - len(elements)))
        step = (len(elements) - SAMPLE_WIDTH) // (SAMPLE_BLOCKS - 1)
        blocks = elements[: (SAMPLE_BLOCKS - 1) * step + SAMPLE_WIDTH].unfold(0, SAMPLE_WIDTH, step)
        return blocks.to(torch.int64).reshape(-1)

    sums: list[list[int]] = []
    for start in range(0, len(tensors), SAMPLED_TOGETHER):
        samples_NE = torch.stack([sample(tensor) for tensor in tensors[start : start + SAMPLED_TOGETHER]])
        places_E = torch.arange(1, SAMPLE + 1, device=samples_NE.device)
        sums += torch.stack((samples_NE.sum(1), (samples_NE * places_E).sum(1)), 1).tolist()
    return ["".join(f"{number & (2**64 - 1):016x}" for number in pair) for pair in sums]
