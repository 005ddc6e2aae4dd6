"""Copying tensors into the memory of a bucket."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.checksum import tensor_checksum
from millrace.extension.millrace_pieces import Pieces
from millrace.weights.transports.base import specs_of
from millrace.weights.transports.cuda_ipc import copy_together
from millrace.weights.transports.slots import copy_to_host

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.uint8])


@given(st.lists(st.tuples(SHAPES, DTYPES, st.booleans()), min_size=1, max_size=12))
def test_both_ways_to_copy_write_the_same_bytes(kinds: list[tuple[tuple[int, ...], torch.dtype, bool]]) -> None:
    make = torch.Generator().manual_seed(0)
    tensors: list[tuple[str, torch.Tensor]] = []
    for shape, dtype, turned in kinds:
        tensor = torch.randint(0, 99, shape, generator=make).to(dtype)
        tensors.append((str(len(tensors)), tensor.mT if turned and tensor.ndim > 1 else tensor))
    specs = specs_of(tensors)
    together, one_by_one = (torch.zeros(specs[-1].offset + specs[-1].nbytes + 1, dtype=torch.uint8) for _ in range(2))
    copy_together(tensors, specs, together)
    checksums = copy_to_host(tensors, specs, one_by_one)
    assert torch.equal(together, one_by_one)
    assert checksums == {name: tensor_checksum(tensor.contiguous()) for name, tensor in tensors}


def test_stretches_that_overlap_are_refused() -> None:
    first, last = Pieces([(1, 2), (4, 3)]).of(torch.arange(9))
    assert (first.tolist(), last.tolist()) == ([1, 2], [4, 5, 6])
    with pytest.raises(ValueError, match="begins at 2, before the end of the last one, 3"):
        Pieces([(1, 2), (2, 3)])
