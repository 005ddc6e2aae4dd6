"""Copies of parts of a bucket into tensors, many in one call. Extensions of engines run this file.

A bucket is a tensor of bytes, [nbytes] uint8, that holds other tensors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from millrace_chunks import Chunks, fits, usable

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


class Plain(NamedTuple):
    """Copies of contiguous bytes of a bucket, as one kernel. targets: keeps their memory."""

    chunks: Chunks
    targets: "Sequence[torch.Tensor]"

    def run(self, bucket: "torch.Tensor") -> None:
        """Make the copies."""
        self.chunks.run(source_base=bucket.data_ptr())


Copies = Fused | Plain


def fused(pairs: "Iterable[tuple[torch.Tensor, Slice]]") -> list[Copies]:
    """Group copies, each into a tensor of the slice's shape, so that each group is one call.

    On a GPU, contiguous elements of one dtype are copied by a kernel of ours, and torch makes the other copies. Torch
    uses one kernel only if all have the same two dtypes and each has the same strides on both sides. So contiguous
    elements become one dimension, and copies with other strides are a group of their own.
    """
    groups: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[Slice]]] = {}
    plain: list[tuple[torch.Tensor, Slice]] = []
    for target, source in pairs:
        flat = target.is_contiguous() and source.is_contiguous
        if flat and target.dtype == source.dtype and usable(target.device) and _fits(target, source):
            plain.append((target, source))
            continue
        targets, sources = groups.setdefault((target.dtype, source.dtype, flat), ([], []))
        targets.append(target.view(-1) if flat else target)
        sources.append(Slice(source.offset, (math.prod(source.shape),), (1,), source.dtype) if flat else source)
    found: list[Copies] = [Fused(targets, sources) for targets, sources in groups.values()]
    if plain:
        table = [(source.offset, target.data_ptr(), target.nbytes) for target, source in plain]
        found.append(Plain(Chunks(table, plain[0][0].device), [target for target, _ in plain]))
    return found


def _fits(target: "torch.Tensor", source: Slice) -> bool:
    return bool(fits(source.offset, target.nbytes) and fits(target.data_ptr(), target.nbytes))


def copy_out(bucket: "torch.Tensor", copies: Iterable[Copies]) -> None:
    """Make the copies. Floats are rounded to the targets' dtypes."""
    import torch

    with torch.no_grad():
        for group in copies:
            group.run(bucket)


def as_dtype(bucket: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Return a bucket's bytes as elements of a dtype, without those at the end that make no whole element."""
    return bucket[: len(bucket) // dtype.itemsize * dtype.itemsize].view(dtype)
