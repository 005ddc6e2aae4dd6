"""Copies of parts of a bucket into tensors, many in one call. Extensions of engines run this file.

A bucket is a tensor of bytes, [nbytes] uint8, that holds other tensors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Slice(NamedTuple):
    """Elements of a bucket. offset: of the first one, in bytes; a multiple of its size. stride: in elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: "torch.dtype"

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class Fused(NamedTuple):
    """Copies that torch makes in one call: `sources[i]` of a bucket into `targets[i]`."""

    targets: "Sequence[torch.Tensor]"
    sources: Sequence[Slice]


def fused(pairs: "Iterable[tuple[torch.Tensor, Slice]]") -> list[Fused]:
    """Group copies, each into a tensor of the slice's shape, so that each group is one call.

    On a GPU, torch makes copies in one kernel only if all have the same two dtypes and each has the same strides on
    both sides. So contiguous elements become one dimension, and all other copies are a group of their own.
    """
    groups: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[Slice]]] = {}
    for target, source in pairs:
        flat = target.is_contiguous() and source.is_contiguous
        targets, sources = groups.setdefault((target.dtype, source.dtype, flat), ([], []))
        targets.append(target.view(-1) if flat else target)
        sources.append(Slice(source.offset, (math.prod(source.shape),), (1,), source.dtype) if flat else source)
    return [Fused(targets, sources) for targets, sources in groups.values()]


def copy_out(bucket: "torch.Tensor", copies: Iterable[Fused]) -> None:
    """Make the copies. Floats are rounded to the targets' dtypes."""
    import torch

    with torch.no_grad():
        for targets, sources in copies:
            elements = as_dtype(bucket, sources[0].dtype)
            first, size = elements.storage_offset(), elements.itemsize
            views = [elements.as_strided(s.shape, s.stride, first + s.offset // size) for s in sources]
            torch._foreach_copy_(list(targets), views)


def as_dtype(bucket: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Return a bucket's bytes as elements of a dtype, without those at the end that make no whole element."""
    return bucket[: len(bucket) // dtype.itemsize * dtype.itemsize].view(dtype)
