"""The layouts of buckets. What is computed of a layout is kept, because a trainer publishes the same tensors again."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from millrace.extension.millrace_chunks import Chunks, fits, usable
from millrace.extension.millrace_samples import SampledPlaces, separated
from millrace.types import TensorSpec
from millrace.weights.plan import layout, padded
from millrace.weights.transports.base import NamedTensors

KEPT = 256  # layouts; a trainer has one for each of its buckets


class BucketLayout:
    """The names, dtypes and shapes of tensors, and their places in a bucket.

    specs: the tensors. names: theirs, in order. nbytes: the size of the bucket.
    """

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = specs
        self.names = tuple(spec.name for spec in specs)
        self.nbytes = specs[-1].offset + padded(specs[-1].nbytes) if specs else 0
        self._places: SampledPlaces | None = None
        self._packing: _Packing | None = None

    def samples_in(self, bucket: torch.Tensor) -> dict[str, str]:
        """Return the sampled checksum of each tensor in a bucket, [nbytes] uint8, by its name."""
        places = self._places
        if places is None or places.device != bucket.device:
            sizes = [(getattr(torch, spec.dtype).itemsize, spec) for spec in self.specs]
            tensors = [(itemsize, spec.nbytes // itemsize, spec.offset) for itemsize, spec in sizes]
            places = self._places = SampledPlaces(tensors, bucket.device)
        return dict(zip(self.names, separated(places.checksums(bucket)), strict=True))

    def pack_on_gpu(self, tensors: NamedTensors, target: torch.Tensor) -> None:
        """Copy the tensors into `target`, a uint8 tensor of at least [nbytes] on a GPU, and wait for the copies."""
        packing = self._packing
        if packing is None or not packing.serves(tensors, target.device):
            packing = self._packing = _Packing(tensors, self.specs, target.device)
        packing.run(tensors, target)
        torch.cuda.current_stream(target.device).synchronize()  # engines must not read it before it is written


class _Packing:
    """The copies of tensors, which stay where they are, into a bucket on a GPU."""

    def __init__(self, tensors: NamedTensors, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self._device, self._sources = device, _sources(tensors)
        copies: list[tuple[int, int, int]] = []
        self._others: list[int] = []
        self._specs = specs
        by_kernel = usable(device)
        for index, (spec, (address, plain, of)) in enumerate(zip(specs, self._sources, strict=True)):
            if by_kernel and plain and of == device and fits(address, spec.nbytes):
                copies.append((address, spec.offset, spec.nbytes))
            else:
                self._others.append(index)
        self._chunks = Chunks(copies, device) if copies else None

    def serves(self, tensors: NamedTensors, device: torch.device) -> bool:
        """Return whether these are the tensors, or others in their places."""
        return device == self._device and _sources(tensors) == self._sources

    def run(self, tensors: NamedTensors, target: torch.Tensor) -> None:
        if self._chunks is not None:
            self._chunks.run(target_base=target.data_ptr())
        if self._others:
            copy_together([tensors[index] for index in self._others], [self._specs[i] for i in self._others], target)


def _sources(tensors: NamedTensors) -> list[tuple[int, bool, torch.device]]:
    """Return where each tensor is, and whether it is contiguous there."""
    return [(tensor.data_ptr(), tensor.is_contiguous(), tensor.device) for _, tensor in tensors]


def layout_of(tensors: NamedTensors) -> BucketLayout:
    """Return the layout of a bucket with these tensors."""
    return _layout(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors))


@lru_cache(KEPT)
def _layout(tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> BucketLayout:
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, dtype, shape in tensors:
        rows.append((name, str(dtype).removeprefix("torch."), tuple(shape), shape.numel() * dtype.itemsize))
    return BucketLayout(layout(rows))


def copy_together(tensors: NamedTensors, specs: Sequence[TensorSpec], target: torch.Tensor) -> None:
    """Copy the tensors into `target`, a uint8 tensor of shape [nbytes] on any device, by one call of torch for each of
    their dtypes.

    A tensor with gaps or in another order of dimensions takes a kernel of its own.
    """
    alike: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    memory: dict[torch.dtype, torch.Tensor] = {}
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        dtype = tensor.dtype
        if dtype not in memory:
            memory[dtype] = target[: len(target) // dtype.itemsize * dtype.itemsize].view(dtype)
        strides = tensor.stride() if tensor.is_contiguous() else torch.empty(tensor.shape, device="meta").stride()
        start = memory[dtype].storage_offset() + spec.offset // dtype.itemsize
        places, some = alike.setdefault(dtype, ([], []))
        places.append(memory[dtype].as_strided(tensor.shape, strides, start))
        some.append(tensor)
    with torch.no_grad():
        for places, some in alike.values():
            torch._foreach_copy_(places, some, non_blocking=True)
