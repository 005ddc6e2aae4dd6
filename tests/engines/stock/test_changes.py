"""Changed elements of a tensor go where a copy of a box of the tensor would put them."""

import importlib
import sys
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.launching import EXTENSION
from millrace.extension.millrace_boxes import box_of
from tests.engines.stock.test_parts import at, boxes


def changes() -> Any:
    """The module, as the engines import it."""
    with patch.object(sys, "path", [str(EXTENSION), *sys.path]):
        return importlib.import_module("millrace_changes")


@given(case=boxes(), order=st.permutations(range(3)), margin=st.integers(0, 2), data=st.data())
def test_elements_go_where_a_copy_of_a_box_puts_them(
    case: Any, order: list[int], margin: int, data: st.DataObject
) -> None:
    """The place is a region of a larger parameter, as in fused layers, whose dimensions may be in another order."""
    shape, box, _ = case
    old = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    chosen = data.draw(st.lists(st.integers(0, old.numel() - 1), unique=True).map(sorted))
    new = old.clone()
    new.view(-1)[chosen] *= -1

    def source(tensor: torch.Tensor) -> torch.Tensor:
        return at(tensor, box).permute([dim for dim in order if dim < len(shape)])

    view = source(old)
    found = box_of(shape, int(view.storage_offset()), view.shape, view.stride())
    assert found is not None
    parameter = torch.zeros([size + 2 * margin for size in view.shape], dtype=torch.bfloat16)
    target = parameter
    for dim, size in enumerate(view.shape):
        target = target.narrow(dim, margin, size)
    target.copy_(view)
    expected = parameter.clone()
    expected[tuple(slice(margin, margin + size) for size in view.shape)] = source(new).bfloat16()

    module = changes()
    need = module.Need("p", target, *found)
    module.scatter(shape, [need], torch.tensor(chosen, dtype=torch.int32), new.view(-1)[chosen])
    assert torch.equal(parameter, expected)
    assert torch.equal(module.source_of(new, need), source(new))
    assert module.differing({"w": new}, {"w": [need]}) == []
    assert module.differing({"w": new + 64}, {"w": [need]}) == ["p"]
