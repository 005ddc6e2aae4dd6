"""Which copies of strided tensors are copies of rows of bytes, for the kernels."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.extension.millrace_chunks import WORD, Rows, rows_of

SIZES = st.sampled_from([0, 1, 2, 3, 8])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A source and a target of one shape and dtype: slices of larger tensors, in any order of their dimensions."""
    shape = draw(st.lists(SIZES, max_size=4))
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))

    def view() -> torch.Tensor:
        order = draw(st.permutations(range(len(shape))))
        larger = [shape[dim] + draw(st.integers(0, 2)) for dim in order]
        whole = torch.randint(0, 100, tuple(larger)).to(dtype)
        for place, dim in enumerate(order):
            start = draw(st.integers(0, larger[place] - shape[dim]))
            whole = whole.narrow(place, start, shape[dim])
        back = sorted(range(len(order)), key=order.__getitem__)
        return whole.permute(back)

    return view(), view()


@given(pairs())
def test_the_rows_of_a_copy_are_its_bytes(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    source, target = pair
    args = (source.data_ptr(), target.data_ptr(), source.itemsize, source.shape, source.stride(), target.stride())
    rows = rows_of(*args)
    if rows is None and source.numel():
        assert sum(size > 1 for size in source.shape) > 1  # a copy along one dimension always is one
    if rows is None:
        return
    ahead, within = np.arange(rows.rows)[:, None], np.arange(rows.row_bytes)[None, :]
    begin = rows.source - source.data_ptr(), rows.target - target.data_ptr()
    taken, put = (
        (start + ahead * pitch + within).flatten()
        for start, pitch in zip(begin, (rows.source_pitch, rows.target_pitch), strict=True)
    )
    bytes_at(target)[put] = bytes_at(source)[taken]
    assert torch.equal(source, target)


def bytes_at(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor from its first element on."""
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return memory[tensor.storage_offset() * tensor.itemsize :].numpy()


def test_rows_fit_if_they_are_whole_words() -> None:
    assert Rows(0, 64, 3, 2 * WORD, 16, 32).fits
    assert not any(
        Rows(*numbers).fits for numbers in ((4, 64, 3, 16, 16, 32), (0, 64, 3, 20, 24, 32), (0, 64, 3, 16, 18, 32))
    )


def test_columns_are_rows_and_turned_matrices_are_not() -> None:
    assert rows_of(0, 0, 2, (10, 8), (64, 1), (8, 1)) == Rows(0, 0, 10, 16, 128, 16)
    assert rows_of(0, 0, 2, (10, 8), (8, 1), (8, 1)) == Rows(0, 0, 1, 160, 160, 160)
    assert rows_of(0, 0, 2, (10, 8), (1, 10), (8, 1)) is None
