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
    alike: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((kinds[tensor.itemsize], tensor.numel() > SAMPLE), []).append(index)

    def blocks(tensor: torch.Tensor) -> torch.Tensor:
        step = (tensor.numel() - SAMPLE_WIDTH) // (SAMPLE_BLOCKS - 1)
        return tensor.as_strided((SAMPLE_BLOCKS, SAMPLE_WIDTH), (step, 1))

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((tensor.numel(),), (1,))

    # Few calls of torch for each tensor, since there are hundreds and an engine stands still meanwhile.
    sums: dict[int, list[int]] = {}
    with torch.no_grad():
        for (kind, large), indices in alike.items():
            for start in range(0, len(indices), SAMPLED_TOGETHER):
                some = indices[start : start + SAMPLED_TOGETHER]
                views = [(blocks if large else whole)(tensors[index]).view(kind) for index in some]
                stacked = torch.stack(views) if large else torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
                samples_NE = stacked.flatten(1).to(torch.int64)
                places_E = torch.arange(1, samples_NE.shape[1] + 1, device=samples_NE.device)
                made = torch.stack((samples_NE.sum(1), (samples_NE * places_E).sum(1)), 1).tolist()
                sums.update(zip(some, made, strict=True))
    return ["".join(f"{number & (2**64 - 1):016x}" for number in sums[index]) for index in range(len(tensors))]
