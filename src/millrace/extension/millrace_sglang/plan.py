"""The plan of one bucket layout: the copies into this rank's parameters that load it."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from millrace_copies import Fused, Slice, as_dtype, copy_out, fused
from millrace_samples import integer_dtype

from .recording import Copy, Recording

SAMPLED = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}  # about so many places along each dimension of a copy are compared


@dataclass(frozen=True, slots=True)
class Samples:
    """Evenly spread elements of a parameter, and where they come from.

    held: positions of the elements in the parameter's memory. sent: their positions in the bucket, in elements.
    """

    parameter: str
    target: torch.Tensor
    dtype: torch.dtype
    held: torch.Tensor
    sent: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """The copies of one layout. elements: how many of each parameter they write. samples: what is compared."""

    copies: tuple[Fused, ...]
    elements: Mapping[str, int]
    samples: tuple[Samples, ...] = field(repr=False)

    def run(self, bucket: torch.Tensor) -> None:
        """Copy a bucket's tensors into the parameters. bucket: [nbytes] uint8."""
        copy_out(bucket, self.copies)

    def differing(self, bucket: torch.Tensor) -> list[str]:
        """Return the parameters whose content differs from what was copied into them, by samples of each copy."""
        unlike = []
        for one in self.samples:
            memory = one.target.as_strided((one.target.untyped_storage().nbytes() // one.target.itemsize,), (1,), 0)
            held = memory[one.held]
            sent = as_dtype(bucket, one.dtype)[one.sent].to(held.dtype)
            integers = integer_dtype(held.itemsize)
            unlike.append((held.view(integers) != sent.view(integers)).any())
        found = torch.stack(unlike).tolist() if unlike else []
        return sorted({one.parameter for one, differs in zip(self.samples, found, strict=True) if differs})


def plan_of(recording: Recording) -> Plan | str:
    """Return the plan of a recording, or why there is none."""
    if recording.other is not None:
        return recording.other
    elements = Counter(recording.filled)
    places = Counter((copy.target.data_ptr(), copy.shape) for copy in recording.copies)
    for copy in recording.copies:
        if places[copy.target.data_ptr(), copy.shape] > 1:
            return f"several copies into the same place of {copy.parameter}"
        if copy.offset % copy.dtype.itemsize:
            return f"a copy into {copy.parameter} from an odd address"
        elements[copy.parameter] += math.prod(copy.shape)
    pairs = [(copy.target, Slice(copy.offset, copy.shape, copy.stride, copy.dtype)) for copy in recording.copies]
    return Plan(tuple(fused(pairs)), elements, tuple(samples_of(recording.copies)))


def samples_of(copies: Sequence[Copy]) -> Iterator[Samples]:
    """Yield the samples of the copies, those into one parameter together."""
    key = lambda copy: (copy.parameter, str(copy.dtype))  # noqa: E731
    for _, group in itertools.groupby(sorted(copies, key=key), key=key):
        some = list(group)
        first = some[0].target
        held = [positions(copy.shape, copy.target.stride(), int(copy.target.storage_offset())) for copy in some]
        sent = [positions(copy.shape, copy.stride, copy.offset // copy.dtype.itemsize) for copy in some]
        indices = (torch.cat(one).to(first.device) for one in (held, sent))
        yield Samples(some[0].parameter, first, some[0].dtype, *indices)


def positions(shape: Sequence[int], stride: Sequence[int], start: int) -> torch.Tensor:
    """Return where evenly spread elements of a strided tensor lie, in elements: [n] int64. Which elements these are
    depends on the shape only."""
    most = SAMPLED.get(len(shape), (math.prod(shape),) * len(shape))
    found = torch.tensor([start])
    for size, step, count in zip(shape, stride, most, strict=True):
        places = torch.arange(0, size, max(1, size // count)) * step
        found = (found[:, None] + places).flatten()
    return found
