"""Parts of tensors in a bucket, and which of their elements go to a place that needs a box of the tensor.

Extensions of engines run this file.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from millrace_boxes import Box, common, elements, label, shape_of, strides_of
from millrace_copies import Slice

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """A box of a tensor, contiguous in a bucket. offset: in bytes, a multiple of an element's size."""

    name: str
    dtype: "torch.dtype"
    box: Box
    offset: int

    @property
    def label(self) -> str:
        """The part's name, such as `w[0:4,8:16]`."""
        text: str = label(self.name, self.box)
        return text

    @property
    def nbytes(self) -> int:
        count: int = elements(self.box)
        return count * self.dtype.itemsize


class Piece(NamedTuple):
    """The elements of a part that go to a place.

    starts: where the first of them goes, along each dimension of the place. source: where they are in the bucket, in
    the dimensions of the place.
    """

    starts: tuple[int, ...]
    source: Slice


def piece_of(part: Part, box: Box, along: Sequence[int | None]) -> Piece | None:
    """Return what of a part goes to a place that needs `box` of the tensor; None if nothing does.

    along: which dimension of the tensor each dimension of the place goes along; None for one with a single element.
    """
    both = common(part.box, box)
    if both is None:
        return None
    steps = strides_of(shape_of(part.box))
    starts, shape, strides = [], [], []
    for dim in along:
        starts.append(0 if dim is None else both[dim][0] - box[dim][0])
        shape.append(1 if dim is None else both[dim][1] - both[dim][0])
        strides.append(1 if dim is None else steps[dim])
    ahead = sum((here[0] - own[0]) * step for here, own, step in zip(both, part.box, steps, strict=True))
    offset = part.offset + ahead * part.dtype.itemsize
    return Piece(tuple(starts), Slice(offset, tuple(shape), tuple(strides), part.dtype))
