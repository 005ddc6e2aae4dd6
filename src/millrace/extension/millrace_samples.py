"""Sampled checksums of tensors. The trainer computes them of what it sends, and the engines of what they hold.

At most 8,192 elements of a tensor are read, as integers: all of them, or 128 evenly spread blocks of 64, which include
the first and the last. The checksum is their sum and their sum weighted by position, both modulo 2^64. It distinguishes
weight versions, and detects tensors that were not written, written in part or written to the wrong place. It may miss a
single changed element of a large tensor.

The engines' interpreters run this file too, so it imports nothing of Millrace.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

SAMPLE_BLOCKS, SAMPLE_WIDTH = 128, 64
SAMPLE = SAMPLE_BLOCKS * SAMPLE_WIDTH  # elements of a tensor
DIGITS = 32  # of a checksum
SAMPLED_TOGETHER = 128  # tensors; their samples take 8 MiB as integers of 8 bytes


def sampled_checksums(tensors: "Sequence[torch.Tensor]") -> list[str]:
    """Return a checksum of each tensor as 32 hex digits, computed on the tensors' device.

    tensors: contiguous, of any dtype, all on one device.
    """
    import torch

    alike: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.itemsize, min(tensor.numel(), SAMPLE + 1)), []).append(index)

    def samples(index: int) -> "torch.Tensor":
        tensor = tensors[index]
        starts, width = _blocks(tensor.numel())
        return tensor.as_strided((len(starts), width), (_step(tensor.numel()), 1)).view(integer_dtype(tensor.itemsize))

    # Tensors are batched to make few torch calls: there are thousands of tensors, and the engine waits meanwhile.
    sums: dict[int, list[int]] = {}
    with torch.no_grad():
        for indices in alike.values():
            for start in range(0, len(indices), SAMPLED_TOGETHER):
                batch = indices[start : start + SAMPLED_TOGETHER]
                stacked = torch.stack([samples(index) for index in batch])
                sums.update(zip(batch, _sums(stacked.flatten(1)).tolist(), strict=True))
    return [hexadecimal(sums[index]) for index in range(len(tensors))]


class SampledPlaces:
    """The places in a bucket that `checksums` reads, for tensors whose sizes and places stay the same.

    tensors: itemsize, number of elements and offset in bytes of each, which is a multiple of the itemsize. device: of
    the buckets.
    """

    def __init__(self, tensors: "Sequence[tuple[int, int, int]]", device: "torch.device") -> None:
        import torch

        self.device = device
        chunks = _beside("millrace_chunks")
        by_kernel = chunks.usable(device)
        alike: dict[tuple[int, int], list[int]] = {}
        for index, (itemsize, elements, _) in enumerate(tensors):
            alike.setdefault((itemsize, 0 if by_kernel else min(elements, SAMPLE + 1)), []).append(index)
        together = len(tensors) if by_kernel else SAMPLED_TOGETHER
        self._batches: list[_Places | _KernelPlaces] = []
        order: list[int] = []
        for (itemsize, _), indices in alike.items():
            for start in range(0, len(indices), together):
                batch = indices[start : start + together]
                order += batch
                firsts_N = torch.tensor([tensors[index][2] // itemsize for index in batch]).to(device)
                steps_N = torch.tensor([_step(tensors[index][1]) for index in batch]).to(device)
                shapes = [_blocks(tensors[index][1]) for index in batch]
                if by_kernel:
                    widths_N = torch.tensor([max(width, 1) for _, width in shapes]).to(device)
                    counts_N = torch.tensor([len(blocks) * width for blocks, width in shapes]).to(device)
                    kernel = chunks.kernels().sum_samples
                    self._batches.append(_KernelPlaces(kernel, itemsize, firsts_N, steps_N, widths_N, counts_N))
                else:
                    self._batches.append(_Places(itemsize, len(shapes[0][0]), shapes[0][1], firsts_N, steps_N))
        self._order = torch.tensor(order).argsort()

    def checksums(self, bucket: "torch.Tensor") -> str:
        """Return the checksums of the tensors in a bucket, [nbytes] uint8, as 32 hex digits for each in their order."""
        return self.begin(bucket)()

    def begin(self, bucket: "torch.Tensor") -> Callable[[], str]:
        """Begin to compute `checksums`, on a GPU in the current stream. Return a function that waits for them."""
        import torch

        if not self._batches:
            return str
        with torch.no_grad():
            sums = torch.cat([one.sums(bucket) for one in self._batches])

        def read() -> str:
            return sums.cpu()[self._order].numpy().astype(">i8").tobytes().hex()

        return read


class SampledTensors:
    """Tensors that stay where they are in memory, for checksums again and again. All are contiguous, on one device."""

    def __init__(self, tensors: "Sequence[torch.Tensor]") -> None:
        self._tensors = tensors
        self._places: SampledPlaces | None = None
        if tensors and _beside("millrace_chunks").usable(tensors[0].device):
            # A kernel reads at any distance from the first tensor.
            first, device = tensors[0].data_ptr(), tensors[0].device
            self._places = SampledPlaces(
                [(one.itemsize, one.numel(), one.data_ptr() - first) for one in tensors], device
            )

    def checksums(self) -> list[str]:
        """Return the sampled checksum of each tensor."""
        import torch

        if self._places is None:
            return sampled_checksums(self._tensors)
        return separated(self._places.checksums(self._tensors[0].detach().view(-1).view(torch.uint8)))


class _Places(NamedTuple):
    """The samples of tensors that are read alike.

    Each has so many blocks of `width` elements. The first begins at `firsts[i]`, and each other one `steps[i]` elements
    after the one before.
    """

    itemsize: int
    blocks: int
    width: int
    firsts: "torch.Tensor"
    steps: "torch.Tensor"

    def sums(self, bucket: "torch.Tensor") -> "torch.Tensor":
        """Return the two sums of each tensor: [N, 2] int64."""
        import torch

        elements = bucket[: len(bucket) // self.itemsize * self.itemsize].view(integer_dtype(self.itemsize))
        windows = elements.as_strided((len(elements) - self.width + 1, self.width), (1, 1))
        starts_NB = self.firsts[:, None] + self.steps[:, None] * torch.arange(self.blocks, device=bucket.device)
        return _sums(windows.index_select(0, starts_NB.flatten()).view(len(self.firsts), -1))


class _KernelPlaces(NamedTuple):
    """Like `_Places`, for tensors of one itemsize that a kernel reads (`millrace_kernels.sum_samples`).

    widths: of the blocks of each tensor. counts: how many elements its blocks have.
    """

    kernel: Any
    itemsize: int
    firsts: "torch.Tensor"
    steps: "torch.Tensor"
    widths: "torch.Tensor"
    counts: "torch.Tensor"

    def sums(self, bucket: "torch.Tensor") -> "torch.Tensor":
        """Return the two sums of each tensor: [N, 2] int64."""
        import torch

        elements = bucket[: len(bucket) // self.itemsize * self.itemsize].view(integer_dtype(self.itemsize))
        sums_N2 = torch.empty(len(self.firsts), 2, dtype=torch.int64, device=bucket.device)
        with torch.cuda.device_of(bucket):  # type: ignore[no-untyped-call]
            launch = self.kernel[(len(self.firsts),)]
            launch(elements, *self[2:], sums_N2, MOST=SAMPLE, num_warps=8)
        return sums_N2


def _blocks(elements: int) -> tuple[Sequence[int], int]:
    """Return where the blocks begin that are read of a tensor, and their width, in elements."""
    if elements <= SAMPLE:
        return (0,), elements
    step = _step(elements)
    return range(0, step * SAMPLE_BLOCKS, step), SAMPLE_WIDTH


def _step(elements: int) -> int:
    """Return the distance between the begins of two blocks of a tensor, in elements; 0 if it is read whole."""
    return (elements - SAMPLE_WIDTH) // (SAMPLE_BLOCKS - 1) if elements > SAMPLE else 0


def _sums(samples_NE: "torch.Tensor") -> "torch.Tensor":
    """Return the two sums of each row: [N, 2] int64."""
    import torch

    wide_NE = samples_NE.to(torch.int64)
    first_N = wide_NE.sum(1)
    if wide_NE is samples_NE:  # it may be a tensor's own memory
        wide_NE = wide_NE.clone()
    return torch.stack((first_N, wide_NE.mul_(torch.arange(1, wide_NE.shape[1] + 1, device=wide_NE.device)).sum(1)), 1)


def integer_dtype(itemsize: int) -> "torch.dtype":
    """Return the dtype of integers of this many bytes. As integers, elements that are NaN can be compared."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]


def separated(checksums: str) -> list[str]:
    """Return the checksums that `SampledPlaces.checksums` or a join has written one after the other."""
    return [checksums[start : start + DIGITS] for start in range(0, len(checksums), DIGITS)]


def _beside(module: str) -> Any:
    """Import a module beside this file as this one was imported: by a name of its own, or as a part of Millrace."""
    return import_module(__name__.rpartition("millrace_")[0] + module)


def hexadecimal(sums: Iterable[int]) -> str:
    """Return 16 hex digits for each sum."""
    return "".join(f"{number & (2**64 - 1):016x}" for number in sums)
