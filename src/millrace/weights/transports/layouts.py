"""The layouts of buckets. What is computed of a layout is kept, because a trainer publishes the same tensors again."""

from collections.abc import Callable
from functools import lru_cache

import torch

from millrace.buckets import TensorSpec
from millrace.extension.millrace_samples import SampledPlaces, separated
from millrace.weights.packing import Packing, Place
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
        self._packing: tuple[object, torch.device, Packing] | None = None  # and for tensors where

    def samples_in(self, bucket: torch.Tensor) -> Callable[[], dict[str, str]]:
        """Begin to compute the sampled checksum of each tensor in a bucket, [nbytes] uint8. Return a function that
        returns them by the tensors' names. The bucket may be filled again before that is called."""
        places = self._places
        if places is None or places.device != bucket.device:
            sizes = [(getattr(torch, spec.dtype).itemsize, spec) for spec in self.specs]
            tensors = [(itemsize, spec.nbytes // itemsize, spec.offset) for itemsize, spec in sizes]
            places = self._places = SampledPlaces(tensors, bucket.device)
        computed = places.begin(bucket)
        return lambda: dict(zip(self.names, separated(computed()), strict=True))

    def pack_on_gpu(self, tensors: NamedTensors, target: torch.Tensor) -> None:
        """Copy the tensors into `target`, a uint8 tensor of at least [nbytes] on a GPU, in its current stream. Does not
        wait for the copies."""
        where = _where(tensors)
        if self._packing is None or self._packing[:2] != (where, target.device):
            places = [Place(spec.offset, getattr(torch, spec.dtype), spec.shape) for spec in self.specs]
            packing = Packing((tensor for _, tensor in tensors), places, target.device)
            self._packing = where, target.device, packing
        self._packing[2].run(target, lambda index: tensors[index][1])


def _where(tensors: NamedTensors) -> list[tuple[int, bool, torch.device]]:
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
