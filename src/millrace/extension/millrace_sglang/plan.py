"""The plan of one bucket layout: the copies into this rank's parameters that load it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .recording import Copy, Recording

SAMPLED = {1: (2048,), 2: (32, 64), 3: (8, 8, 32)}  # about so many places along each dimension of a copy are compared
COMPARED_TOGETHER = 256  # copies


@dataclass(frozen=True, slots=True)
class Plan:
    """The copies of one layout. elements: how many of each parameter they write."""

    copies: tuple[Copy, ...]
    elements: Mapping[str, int]

    def run(self, bucket: torch.Tensor) -> list[torch.Tensor]:
        """Copy a bucket's tensors into the parameters. Returns the sources, views of the bucket.

        bucket: [nbytes] uint8.
        """
        sources = self.sources(bucket)
        with torch.no_grad():
            torch._foreach_copy_([copy.target for copy in self.copies], sources)
        return sources

    def sources(self, bucket: torch.Tensor) -> list[torch.Tensor]:
        """Return the source of each copy, a view of the bucket."""
        typed: dict[torch.dtype, torch.Tensor] = {}
        for dtype in {copy.dtype for copy in self.copies}:
            typed[dtype] = bucket[: len(bucket) // dtype.itemsize * dtype.itemsize].view(dtype)
        return [
            typed[copy.dtype].as_strided(copy.shape, copy.stride, self._place(bucket, copy)) for copy in self.copies
        ]

    def differing(self, sources: Sequence[torch.Tensor]) -> list[str]:
        """Return the parameters whose content differs from what was copied into them, by samples of each copy."""
        wrong = []
        groups: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
        for index, copy in enumerate(self.copies):
            groups.setdefault((copy.target.dtype, copy.shape), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), COMPARED_TOGETHER):
                some = indices[start : start + COMPARED_TOGETHER]
                held = torch.stack([sample(self.copies[index].target) for index in some])
                sent = torch.stack([sample(sources[index]).to(held.dtype) for index in some])
                unlike = (bits(held) != bits(sent)).flatten(1).any(1).tolist()
                wrong += [self.copies[index].parameter for index, differs in zip(some, unlike, strict=True) if differs]
        return sorted(set(wrong))

    @staticmethod
    def _place(bucket: torch.Tensor, copy: Copy) -> int:
        """Return a source's offset in elements, as `as_strided` takes it."""
        return (bucket.storage_offset() + copy.offset) // copy.dtype.itemsize


def plan_of(recording: Recording) -> Plan | str:
    """Return the plan of a recording, or why there is none."""
    if recording.other is not None:
        return recording.other
    elements = Counter(recording.filled)
    places = Counter((copy.target.data_ptr(), copy.shape) for copy in recording.copies)
    for copy in recording.copies:
        if places[copy.target.data_ptr(), copy.shape] > 1:
            return f"several copies into the same place of {copy.parameter}"
        if copy.offset % copy.dtype.itemsize:
            return f"a copy into {copy.parameter} from an odd address"
        elements[copy.parameter] += math.prod(copy.shape)
    return Plan(tuple(recording.copies), elements)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return evenly spread elements of a tensor, flat. Which ones depends on its shape only."""
    most = SAMPLED.get(tensor.ndim, (tensor.numel(),) * tensor.ndim)
    steps = (max(1, size // count) for size, count in zip(tensor.shape, most, strict=True))
    return tensor[tuple(slice(None, None, step) for step in steps)].reshape(-1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's content as integers, so that NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])
