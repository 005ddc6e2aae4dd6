"""Views of many stretches of one tensor, made in one call. The trainer and the engines' interpreters run this file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Pieces:
    """Stretches of a one-dimensional tensor. stretches: start and length of each in elements, in ascending order; no
    two overlap. Raises ValueError otherwise."""

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        self._sizes: list[int] = []  # of what lies before each stretch, and of the stretch
        self._end = 0
        for start, length in stretches:
            if start < self._end:
                raise ValueError(f"a stretch begins at {start}, before the end of the last one, {self._end}")
            self._sizes += (start - self._end, length)
            self._end = start + length

    def of(self, tensor: "torch.Tensor") -> "Sequence[torch.Tensor]":
        """Return the stretches of this tensor, which share its memory."""
        return tensor[: self._end].split_with_sizes(self._sizes)[1::2]
