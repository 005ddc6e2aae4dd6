"""Copies of a trainer's tensors, or of parts of them, into a bucket."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from millrace.extension.millrace_boxes import strides_of
from millrace.extension.millrace_chunks import Chunks, Rows, rows_of, usable


class Place(NamedTuple):
    """A contiguous tensor in a bucket. offset: in bytes, a multiple of the dtype's size."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Packing:
    """Copies of tensors into a bucket, which are planned once for tensors that stay where they are.

    sources: the tensors, in the order of `places`. device: of the bucket. On a GPU, one kernel makes all copies of rows
    of elements from the same GPU and of the same dtype. Torch makes the others.
    """

    def __init__(self, sources: Iterable[torch.Tensor], places: Sequence[Place], device: torch.device) -> None:
        self._places, self._others = places, list[int]()
        rows: list[Rows] = []
        by_kernel = usable(device)
        for index, (source, place) in enumerate(zip(sources, places, strict=True)):
            copy = None
            if by_kernel and source.device == device and source.dtype == place.dtype:
                address, steps = source.data_ptr(), strides_of(place.shape)
                copy = rows_of(address, place.offset, source.itemsize, place.shape, source.stride(), steps)
            if copy is not None and copy.fits:
                rows.append(copy)
            else:
                self._others.append(index)
        self._chunks = Chunks(rows, device) if rows else None

    def run(self, target: torch.Tensor, source: Callable[[int], torch.Tensor]) -> None:
        """Make the copies, on a GPU without waiting for them.

        target: the bucket, [nbytes] uint8. source: returns a tensor by its number.
        """
        if self._chunks is not None:
            self._chunks.run(target_base=target.data_ptr())
        if self._others:
            copy_together([source(one) for one in self._others], [self._places[one] for one in self._others], target)


def copy_together(sources: Sequence[torch.Tensor], places: Sequence[Place], target: torch.Tensor) -> None:
    """Copy tensors into a bucket, [nbytes] uint8, cast to the places' dtypes, in few calls of torch.

    Torch copies the tensors of a call one by one if one of them has other strides than its place. So contiguous tensors
    are copied apart from others.
    """
    alike: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    memory: dict[torch.dtype, torch.Tensor] = {}
    for source, (offset, dtype, shape) in zip(sources, places, strict=True):
        if dtype not in memory:
            memory[dtype] = target[: len(target) // dtype.itemsize * dtype.itemsize].view(dtype)
        flat = source.is_contiguous()
        start = memory[dtype].storage_offset() + offset // dtype.itemsize
        into, some = alike.setdefault((dtype, source.dtype, flat), ([], []))
        # A contiguous tensor may have any stride along a dimension with one element.
        into.append(memory[dtype].as_strided(shape, source.stride() if flat else strides_of(shape), start))
        some.append(source)
    with torch.no_grad():
        for into, some in alike.values():
            torch._foreach_copy_(into, some, non_blocking=True)
