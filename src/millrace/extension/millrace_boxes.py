"""Boxes: rectangular parts of a tensor. Pure functions.

The trainer and the engines' processes run this file, so it imports nothing, not even torch.
"""

import math
from collections.abc import Iterable, Sequence

Box = tuple[tuple[int, int], ...]  # the start and the end along each dimension of the tensor


def read_box(rows: Iterable[Iterable[int]]) -> Box:
    """Return a box that was read from JSON. Raises ValueError or TypeError if it is none."""
    return tuple((int(start), int(end)) for start, end in rows)


def whole(shape: Sequence[int]) -> Box:
    """Return the box of all elements of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    """Return the number of elements along each dimension."""
    return tuple(end - start for start, end in box)


def elements(box: Box) -> int:
    """Return the number of elements."""
    return math.prod(shape_of(box))


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def common(one: Box, other: Box) -> Box | None:
    """Return the box of the elements that are in both boxes of one tensor; None if there are none."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < end for start, end in both) else None


def without(box: Box, other: Box) -> list[Box]:
    """Return the elements of `box` that are not in `other`, as boxes that do not overlap."""
    both = common(box, other)
    if both is None:
        return [box]
    rest: list[Box] = []
    for dim, ((start, end), (first, last)) in enumerate(zip(box, both, strict=True)):
        pieces = (piece for piece in ((start, first), (last, end)) if piece[0] < piece[1])
        rest += [(*both[:dim], piece, *box[dim + 1 :]) for piece in pieces]
    return rest


def disjoint(boxes: Iterable[Box]) -> list[Box]:
    """Return boxes that contain all of the given ones and do not overlap. Given boxes that overlap become the smallest
    box around them."""
    found: list[Box] = []
    for box in dict.fromkeys(boxes):
        grown = box
        while overlapping := [one for one in found if common(one, grown) is not None]:
            found = [one for one in found if one not in overlapping]
            for one in overlapping:
                grown = tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(grown, one, strict=True))
        found.append(grown)
    return found


def box_of(
    shape: Sequence[int], offset: int, view: Sequence[int], strides: Sequence[int]
) -> tuple[Box, tuple[int | None, ...]] | None:
    """Return the box of a contiguous tensor that a strided view of it is, and along which of the tensor's dimensions
    each dimension of the view goes (None for one with a single element). None if the view is no box.

    shape: of the tensor. offset, view, strides: the first element, shape and strides of the view, in elements.
    """
    own = strides_of(shape)
    starts = [offset // step % size if size else 0 for size, step in zip(shape, own, strict=True)]
    counts, along = [1] * len(shape), list[int | None]()
    for size, step in zip(view, strides, strict=True):
        if size == 1:
            along.append(None)
            continue
        dims = [dim for dim in range(len(shape)) if own[dim] == step and shape[dim] > 1]
        if len(dims) != 1 or counts[dims[0]] > 1 or starts[dims[0]] + size > shape[dims[0]]:
            return None
        counts[dims[0]] = size
        along.append(dims[0])
    return tuple((start, start + count) for start, count in zip(starts, counts, strict=True)), tuple(along)


def label(name: str, box: Box) -> str:
    """Return the name of a part of a tensor, such as `w[0:4,8:16]`."""
    return f"{name}[{','.join(f'{start}:{end}' for start, end in box)}]"
