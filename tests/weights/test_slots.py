"""Copying tensors into the memory of a bucket, and sampling them there."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.checksum import sampled_checksums, tensor_checksum
from millrace.weights.packing import Packing, Place, copy_together
from millrace.weights.plan import padded
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.slots import copy_to_host

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]
SIZES = st.sampled_from([0, 1, 2, 3, 7, 90])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype and shape, some with more elements than are sampled; also transposed, a slice, empty, with gradients or
    without a dimension."""
    shape = draw(st.lists(SIZES, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    made = torch.randint(0, 100, (*shape, 2)).to(dtype)
    if dtype.is_floating_point and draw(st.booleans()):
        made.requires_grad_()
    made = made[..., draw(st.integers(0, 1))] if draw(st.booleans()) else made
    return made.transpose(0, -1) if made.ndim and draw(st.booleans()) else made


@given(st.lists(tensors(), min_size=1, max_size=6), st.integers(0, 100), st.integers(0, 1))
def test_a_bucket_has_the_bytes_and_the_samples_of_its_tensors(
    given: list[torch.Tensor], room: int, start: int
) -> None:
    named = [(str(number), tensor) for number, tensor in enumerate(given)]
    specs = layout_of(named).specs
    nbytes = specs[-1].offset + padded(specs[-1].nbytes) + room
    together = torch.zeros(64 * start + nbytes, dtype=torch.uint8)[64 * start :]
    places = [Place(spec.offset, tensor.dtype, spec.shape) for spec, tensor in zip(specs, given, strict=True)]
    Packing(given, places, together.device).run(together, given.__getitem__)
    for spec, tensor in zip(specs, given, strict=True):
        held = together[spec.offset : spec.offset + spec.nbytes].view(tensor.dtype).view(tensor.shape)
        assert torch.equal(held.float(), tensor.float())
    contiguous = [tensor.detach().contiguous() for tensor in given]
    assert list(layout_of(named).samples_in(together)().values()) == sampled_checksums(contiguous)


@given(st.lists(tensors(), min_size=1, max_size=6))
def test_on_the_host_each_tensor_has_a_checksum(given: list[torch.Tensor]) -> None:
    named = [(str(number), tensor) for number, tensor in enumerate(given) if tensor.numel()]
    if not named:
        return
    specs = layout_of(named).specs
    one_by_one, together = (torch.zeros(specs[-1].offset + specs[-1].nbytes, dtype=torch.uint8) for _ in range(2))
    checksums = copy_to_host(named, specs, one_by_one)
    sources = [tensor for _, tensor in named]
    places = [Place(spec.offset, tensor.dtype, spec.shape) for spec, tensor in zip(specs, sources, strict=True)]
    copy_together(sources, places, together)
    assert torch.equal(together, one_by_one)
    assert checksums == {name: tensor_checksum(tensor.detach().contiguous()) for name, tensor in named}
