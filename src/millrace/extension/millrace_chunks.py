"""Copies of contiguous bytes on one GPU, thousands of them in one kernel.

The trainer and the engines' processes run this file, so it imports nothing of Millrace.
"""

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WORD = 8  # bytes; addresses and sizes of all copies are multiples of it
CHUNK_WORDS = 4096  # for one program of the kernel

log = logging.getLogger(__name__)


class Chunks:
    """Copies on one GPU, each of some bytes from one place to another. The places do not overlap.

    copies: of each the source, the target and the size in bytes. Sources and targets are addresses, or offsets to a
    base that `run` gets. device: the GPU, for which `usable` must be true.
    """

    def __init__(self, copies: Sequence[tuple[int, int, int]], device: "torch.device") -> None:
        import numpy as np
        import torch

        sources, targets, nbytes = np.array(copies, dtype=np.int64).reshape(-1, 3).T
        words = nbytes // WORD
        counts = -(-words // CHUNK_WORDS)
        of = np.repeat(np.arange(len(words)), counts)  # the copy that each chunk is of
        ahead = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK_WORDS
        left = np.minimum(words[of] - ahead, CHUNK_WORDS)
        table = np.stack((sources[of] + WORD * ahead, targets[of] + WORD * ahead, left))
        self._table = torch.from_numpy(table).to(device)

    def run(self, source_base: int = 0, target_base: int = 0) -> None:
        """Make the copies, in the current stream of the GPU. The bases are addresses."""
        import torch

        sources, targets, words = self._table
        if len(words):
            with torch.cuda.device_of(self._table):  # type: ignore[no-untyped-call]
                launch = kernels().copy_chunks[(len(words),)]
                launch(sources, targets, words, source_base, target_base, CHUNK=CHUNK_WORDS)


def fits(address: int, nbytes: int) -> bool:
    """Return whether `Chunks` can copy so many bytes from or to an address, or an offset."""
    return address % WORD == 0 and nbytes % WORD == 0


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
        source = torch.arange(3, dtype=torch.int64, device="cuda")
        target = torch.zeros_like(source)
        Chunks([(0, 0, source.nbytes)], source.device).run(source.data_ptr(), target.data_ptr())
        works = torch.equal(source, target)
    except Exception as error:  # Triton needs a compiler of C, and fails in many ways
        log.warning("tensors are copied one by one, because Triton compiles no kernels here: %s", error)
        return False
    return works
