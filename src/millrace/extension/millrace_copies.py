"""Copies of parts of a bucket into tensors, many in one call. Extensions of engines run this file.

A bucket is a tensor of bytes, [nbytes] uint8, that holds other tensors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from millrace_chunks import Chunks, Rows, rows_of, usable

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

    def run(self, bucket: "torch.Tensor") -> None:
        """Make the copies. Floats are rounded to the targets' dtype."""
        import torch

        elements = as_dtype(bucket, self.sources[0].dtype)
        first, size = elements.storage_offset(), elements.itemsize
        views = [elements.as_strided(s.shape, s.stride, first + s.offset // size) for s in self.sources]
        torch._foreach_copy_(list(self.targets), views)


class ByKernel(NamedTuple):
    """Copies out of a bucket that a kernel of ours makes. targets: keeps their memory."""

    chunks: Chunks
    targets: "Sequence[torch.Tensor]"

    def run(self, bucket: "torch.Tensor") -> None:
        """Make the copies."""
        self.chunks.run(source_base=bucket.data_ptr())


Copies = Fused | ByKernel


def fused(pairs: "Iterable[tuple[torch.Tensor, Slice]]") -> list[Copies]:
    """Group copies, each into a tensor of the slice's shape, so that each group is one call.

    On a GPU, a kernel of ours copies rows of elements of one dtype, and torch makes the other copies. Torch uses one
    kernel only if all have the same two dtypes and each has the same strides on both sides. So contiguous elements
    become one dimension, and copies with other strides are a group of their own.
    """
    groups: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[Slice]]] = {}
    rows: list[Rows] = []
    by_kernel: list[torch.Tensor] = []
    for target, source in pairs:
        if target.dtype == source.dtype and usable(target.device):
            into = target.stride()
            copy = rows_of(source.offset, target.data_ptr(), target.itemsize, source.shape, source.stride, into)
            if copy is not None and copy.fits:
                rows.append(copy)
                by_kernel.append(target)
                continue
        flat = target.is_contiguous() and source.is_contiguous
        targets, sources = groups.setdefault((target.dtype, source.dtype, flat), ([], []))
        targets.append(target.view(-1) if flat else target)
        sources.append(Slice(source.offset, (math.prod(source.shape),), (1,), source.dtype) if flat else source)
    found: list[Copies] = [Fused(targets, sources) for targets, sources in groups.values()]
    if rows:
        found.append(ByKernel(Chunks(rows, by_kernel[0].device), by_kernel))
    return found


def copy_out(bucket: "torch.Tensor", copies: Iterable[Copies]) -> None:
    """Make the copies. Floats are rounded to the targets' dtypes."""
    import torch

    with torch.no_grad():
        for group in copies:
            group.run(bucket)


def as_dtype(bucket: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Return a bucket's bytes as elements of a dtype, without those at the end that make no whole element."""
    return bucket[: len(bucket) // dtype.itemsize * dtype.itemsize].view(dtype)
