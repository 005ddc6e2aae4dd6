"""What goes from a part of a tensor in a bucket to the place that needs a box of the tensor."""

import importlib
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.launching import EXTENSION
from millrace.engines.stock.parts import needs_of
from millrace.engines.stock.state import InvalidStateError
from millrace.extension.millrace_boxes import Box, common


def parts() -> Any:
    """The module, as the engines import it."""
    with patch.object(sys, "path", [str(EXTENSION), *sys.path]):
        return importlib.import_module("millrace_parts")


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    """A shape, and two boxes of such a tensor."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))

    def box() -> Box:
        starts = [draw(st.integers(0, size - 1)) for size in shape]
        return tuple((start, draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True))

    return shape, box(), box()


def at(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, end) for start, end in box)]


@given(case=boxes(), turned=st.booleans(), ahead=st.integers(0, 3))
def test_a_place_gets_what_a_part_has_of_its_box(
    case: tuple[tuple[int, ...], Box, Box], *, turned: bool, ahead: int
) -> None:
    shape, had, needed = case
    tensor = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    bucket = torch.cat([torch.zeros(ahead), at(tensor, had).reshape(-1)])
    along = tuple(reversed(range(len(shape)))) if turned else tuple(range(len(shape)))
    place = torch.zeros([needed[dim][1] - needed[dim][0] for dim in along])
    piece = parts().piece_of(parts().Part("w", torch.float32, had, 4 * ahead), needed, along)
    expected = torch.zeros(shape)
    if piece is None:
        assert common(had, needed) is None
    else:
        source, into = piece.source, place
        for dim, (start, size) in enumerate(zip(piece.starts, source.shape, strict=True)):
            into = into.narrow(dim, start, size)
        into.copy_(bucket.as_strided(source.shape, source.stride, source.offset // 4))
        both = common(had, needed)
        assert both is not None
        at(expected, both).copy_(at(tensor, both))
    assert torch.equal(place, at(expected, needed).permute(along))


def test_needs_are_read_or_refused() -> None:
    answers = [{"boxes": [[[[0, 2], [1, 3]]], []]}, {"boxes": [[], [[[4, 5]]]]}]
    assert needs_of(answers) == [[[((0, 2), (1, 3))], []], [[], [((4, 5),)]]]
    with pytest.raises(InvalidStateError, match=r"its rank 1 can't say which parts .*: its layers are quantised"):
        needs_of([answers[0], {"unplanned": "its layers are quantised (fp8)"}])
