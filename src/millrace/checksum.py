"""Checksums that compare an engine's weights with the weights that were sent."""

from typing import TYPE_CHECKING

import xxhash

from millrace.extension.millrace_samples import SAMPLE, sampled_checksums

if TYPE_CHECKING:
    import torch

__all__ = ["SAMPLE", "Checksum", "checksum", "sampled_checksums", "tensor_checksum"]


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
