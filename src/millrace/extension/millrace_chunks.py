"""Copies on one GPU, and reads of single elements, thousands of them in one kernel.

The trainer and the engines' processes run this file, so it imports nothing of Millrace.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

WORD = 8  # bytes; what the kernels copy
CHUNK_WORDS = 4096  # for one program of a kernel
GATHERED = 1024  # elements, by one program of a kernel

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """A copy of rows of bytes. source, target: addresses, or offsets to a base that `Chunks.run` gets. pitches: the
    distance of the rows, in bytes."""

    source: int
    target: int
    rows: int
    row_bytes: int
    source_pitch: int
    target_pitch: int

    @property
    def fits(self) -> bool:
        """Return whether the kernels can make the copy."""
        return all(number % WORD == 0 for number in (*self[:2], *self[3:]))


def rows_of(
    source: int, target: int, itemsize: int, shape: Sequence[int], strides: Sequence[int], into: Sequence[int]
) -> Rows | None:
    """Return the copy of a strided tensor into another of its shape and dtype; None if it is no copy of rows.

    strides, into: of the source and of the target, in elements.
    """
    dims: list[tuple[int, int, int]] = []
    for size, step, step_into in zip(shape, strides, into, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (step * size, step_into * size):
            dims[-1] = dims[-1][0] * size, step, step_into
        else:
            dims.append((size, step, step_into))
    if not dims or dims[-1][1:] != (1, 1):
        dims.append((1, 1, 1))
    if len(dims) > 2:
        return None
    nbytes = dims[-1][0] * itemsize
    if len(dims) == 1:
        return Rows(source, target, 1, nbytes, nbytes, nbytes)
    rows, step, step_into = dims[0]
    return Rows(source, target, rows, nbytes, step * itemsize, step_into * itemsize)


class Chunks:
    """Copies on one GPU, in one or two kernels. Their targets do not overlap.

    copies: which the kernels can make (`Rows.fits`). device: the GPU, for which `usable` must be true.
    """

    def __init__(self, copies: Iterable[Rows], device: "torch.device") -> None:
        import numpy as np
        import torch

        table = np.array([copy for copy in copies if copy.rows and copy.row_bytes], dtype=np.int64).reshape(-1, 6)
        words = table[:, 2] * table[:, 3] // WORD
        counts = -(-words // CHUNK_WORDS)
        of = np.repeat(np.arange(len(words)), counts)  # the copy that each chunk is of
        firsts = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK_WORDS
        sources, targets, rows, row_bytes, *pitches = table[of].T
        whole = rows == 1
        left = np.minimum(words[of] - firsts, CHUNK_WORDS)
        contiguous = np.stack((sources + WORD * firsts, targets + WORD * firsts, left))[:, whole]
        strided = np.stack((sources, targets, firsts, words[of], row_bytes // WORD, *pitches))[:, ~whole]
        self._contiguous, self._strided = (
            torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in (contiguous, strided)
        )

    def run(self, source_base: int = 0, target_base: int = 0) -> None:
        """Make the copies, in the current stream of the GPU. The bases are addresses."""
        import torch

        with torch.cuda.device_of(self._contiguous):  # type: ignore[no-untyped-call]
            for kernel, table in (("copy_chunks", self._contiguous), ("copy_rows", self._strided)):
                if table.shape[1]:
                    launch = getattr(kernels(), kernel)[(table.shape[1],)]
                    launch(*table, source_base, target_base, CHUNK=CHUNK_WORDS)


class Elements:
    """Single elements in the memory of one GPU. addresses: [n] int64, on the GPU, for which `usable` must be true.
    dtype: of integers as large as the elements."""

    def __init__(self, addresses: "torch.Tensor", dtype: "torch.dtype") -> None:
        self._addresses, self._dtype = addresses, dtype

    def read(self) -> "torch.Tensor":
        """Return the elements, [n], as they are when the current stream of the GPU comes to it."""
        import torch

        count = len(self._addresses)
        values = torch.empty(count, dtype=self._dtype, device=self._addresses.device)
        with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
            launch = kernels().gather[(-(-count // GATHERED),)]
            launch(self._addresses, values, count, BLOCK=GATHERED)
        return values


def kernels() -> Any:
    """Return the module with the kernels, which is beside this file. It is imported as this one was: by a name of its
    own, or as a part of Millrace."""
    return import_module(__name__.rpartition("millrace_")[0] + "millrace_kernels")


def usable(device: "torch.device") -> bool:
    """Return whether kernels can be compiled for this device. The log says why not if it is a GPU."""
    return device.type == "cuda" and _compiles()


@functools.cache
def _compiles() -> bool:
    import torch

    try:
        source = torch.arange(60, dtype=torch.int64, device="cuda").view(6, 10)
        target = torch.zeros_like(source)
        copies = [
            Rows(0, 0, 1, 5 * WORD, 0, 0),
            Rows(5 * WORD, 5 * WORD, 6, 5 * WORD, 10 * WORD, 10 * WORD),
            Rows(10 * WORD, 10 * WORD, 5, 5 * WORD, 10 * WORD, 10 * WORD),
        ]
        Chunks(copies, source.device).run(source.data_ptr(), target.data_ptr())
        works = torch.equal(source, target)
    except Exception as error:  # Triton needs a compiler of C, and fails in many ways
        log.warning("tensors are copied one by one, because Triton compiles no kernels here: %s", error)
        return False
    return works
