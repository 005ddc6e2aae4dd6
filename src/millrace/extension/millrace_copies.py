"""Copies of parts of a bucket into tensors, many in one call. Extensions of engines run this file.

A bucket is a tensor of bytes, [nbytes] uint8, that holds other tensors.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from millrace_pieces import Pieces

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
    """Copies that torch makes in one call: of `sources` of a bucket into the targets, in this order.

    sources: stretches of the bucket's elements in `dtype`, or slices of any shape.
    """

    targets: "Sequence[torch.Tensor]"
    dtype: "torch.dtype"
    sources: Pieces | Sequence[Slice]


def fused(pairs: "Iterable[tuple[torch.Tensor, Slice]]") -> list[Fused]:
    """Group copies, each into a tensor of the slice's shape, so that each group is one call.

    On a GPU, torch makes copies in one kernel only if all have the same two dtypes and each has the same strides on
    both sides. So contiguous elements become one dimension, and all other copies are groups of their own. A stretch
    that goes to two places is copied with those.
    """
    flat: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, Slice]]] = {}
    others: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, Slice]]] = {}
    ends: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for target, source in sorted(pairs, key=lambda pair: pair[1].offset):
        dtypes = source.dtype, target.dtype
        if target.is_contiguous() and source.is_contiguous and source.offset >= ends.get(dtypes, 0):
            flat.setdefault(dtypes, []).append((target, source))
            ends[dtypes] = source.offset + target.numel() * source.dtype.itemsize
        else:
            others.setdefault(dtypes, []).append((target, source))
    return [
        *(Fused([target.view(-1) for target, _ in some], dtype, pieces(some)) for (dtype, _), some in flat.items()),
        *(
            Fused([target for target, _ in some], dtype, [source for _, source in some])
            for (dtype, _), some in others.items()
        ),
    ]


def pieces(pairs: "Sequence[tuple[torch.Tensor, Slice]]") -> Pieces:
    """Return the stretches of the bucket that the slices are, in elements."""
    return Pieces([(source.offset // source.dtype.itemsize, target.numel()) for target, source in pairs])


def copy_out(bucket: "torch.Tensor", copies: Iterable[Fused]) -> None:
    """Make the copies. Floats are rounded to the targets' dtypes."""
    import torch

    with torch.no_grad():
        for targets, dtype, sources in copies:
            elements = as_dtype(bucket, dtype)
            torch._foreach_copy_(list(targets), list(views_of(elements, sources)))


def views_of(elements: "torch.Tensor", sources: Pieces | Sequence[Slice]) -> "Sequence[torch.Tensor]":
    """Return the parts of a bucket, given as elements of one dtype, without a copy."""
    if isinstance(sources, Pieces):
        views: Sequence[torch.Tensor] = sources.of(elements)
        return views
    first, size = elements.storage_offset(), elements.itemsize
    return [elements.as_strided(one.shape, one.stride, first + one.offset // size) for one in sources]


def as_dtype(bucket: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Return a bucket's bytes as elements of a dtype, without those at the end that make no whole element."""
    return bucket[: len(bucket) // dtype.itemsize * dtype.itemsize].view(dtype)
