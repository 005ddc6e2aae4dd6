"""Copying tensors into a bucket."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.weights.plan import padded
from millrace.weights.transports.base import specs_of
from millrace.weights.transports.slots import copy_together

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype and shape, also transposed, a slice, empty, with gradients or without a dimension."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    made = torch.randint(0, 100, (*shape, 2)).to(dtype)
    if dtype.is_floating_point and draw(st.booleans()):
        made.requires_grad_()
    made = made[..., draw(st.integers(0, 1))]
    return made.transpose(0, -1) if shape and draw(st.booleans()) else made


@given(st.lists(tensors(), min_size=1, max_size=8), st.integers(0, 100), st.integers(0, 1))
def test_together_as_one_by_one(given: list[torch.Tensor], room: int, start: int) -> None:
    named = [(str(number), tensor) for number, tensor in enumerate(given)]
    specs = specs_of(named)
    nbytes = specs[-1].offset + padded(specs[-1].nbytes) + room
    together, one_by_one = torch.zeros(64 * start + nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    copy_together(named, specs, together[64 * start :])
    for spec, (_, tensor) in zip(specs, named, strict=True):
        place = one_by_one[spec.offset : spec.offset + spec.nbytes]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    assert torch.equal(together[64 * start :], one_by_one)
