"""The plan of one bucket layout: the copies into this rank's parameters that load it."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from millrace_changes import positions
from millrace_chunks import Elements, usable
from millrace_copies import Copies, Slice, as_dtype, copy_out, fused
from millrace_samples import integer_dtype

from .recording import Copy, Fill, Recording


@dataclass(frozen=True, slots=True)
class Samples:
    """Evenly spread elements of parameters of one dtype, and where they come from.

    held: for each parameter its name, its memory as [elements], and the positions of its samples there. at_once: all
    these elements, where one kernel can read them. sent: the positions of all samples in the bucket, in elements of
    `dtype`.
    """

    dtype: torch.dtype
    held: tuple[tuple[str, torch.Tensor, torch.Tensor], ...]
    at_once: Elements | None
    sent: torch.Tensor

    def unlike(self, bucket: torch.Tensor) -> torch.Tensor:
        """Return which samples differ from the bucket's content, as it is in the parameters' dtype: [n] bool."""
        dtype = self.held[0][1].dtype
        integers = integer_dtype(dtype.itemsize)
        sent = as_dtype(bucket, self.dtype).index_select(0, self.sent).to(dtype).view(integers)
        differs: torch.Tensor = self._read(integers) != sent
        return differs

    def _read(self, integers: torch.dtype) -> torch.Tensor:
        """Return what the parameters hold, as integers: [n]."""
        if self.at_once is not None:
            held: torch.Tensor = self.at_once.read()
            return held
        return torch.cat([memory.index_select(0, places) for _, memory, places in self.held]).view(integers)


@dataclass(frozen=True, slots=True)
class Plan:
    """The copies of one layout, and the constants to write before. elements: how many of each parameter both write.
    samples: what is compared."""

    copies: tuple[Copies, ...]
    fills: tuple[Fill, ...]
    elements: Mapping[str, int]
    samples: tuple[Samples, ...] = field(repr=False)

    def run(self, bucket: torch.Tensor) -> None:
        """Copy a bucket's tensors into the parameters. bucket: [nbytes] uint8."""
        with torch.no_grad():
            for fill in self.fills:
                fill.target.fill_(fill.value)
        copy_out(bucket, self.copies)

    def compare(self, bucket: torch.Tensor) -> Callable[[], list[str]]:
        """Begin to compare samples of each copy with the content of the parameters. Return a function that waits for it
        and returns the parameters whose content differs from what was copied into them."""
        unlike = [one.unlike(bucket) for one in self.samples]
        any_unlike = torch.stack([one.any() for one in unlike]).any() if unlike else torch.tensor(False)

        def differing() -> list[str]:
            if not any_unlike.item():
                return []
            names = []
            for samples, found in zip(self.samples, unlike, strict=True):
                parts = found.split_with_sizes([len(places) for _, _, places in samples.held])
                names += [name for (name, _, _), part in zip(samples.held, parts, strict=True) if part.any()]
            return sorted(set(names))

        return differing


def plan_of(recording: Recording) -> Plan | str:
    """Return the plan of a recording, or why there is none."""
    if recording.other is not None:
        return recording.other
    elements = Counter[str]()
    for fill in recording.fills:
        elements[fill.parameter] += fill.target.numel()
    places = Counter((copy.target.data_ptr(), copy.shape) for copy in recording.copies)
    for copy in recording.copies:
        if places[copy.target.data_ptr(), copy.shape] > 1:
            return f"several copies into the same place of {copy.parameter}"
        if copy.offset % copy.dtype.itemsize:
            return f"a copy into {copy.parameter} from an odd address"
        elements[copy.parameter] += math.prod(copy.shape)
    pairs = [(copy.target, Slice(copy.offset, copy.shape, copy.stride, copy.dtype)) for copy in recording.copies]
    return Plan(tuple(fused(pairs)), tuple(recording.fills), elements, tuple(samples_of(recording.copies)))


def samples_of(copies: Sequence[Copy]) -> Iterator[Samples]:
    """Yield the samples of the copies, those of the same dtypes together."""

    def dtypes(copy: Copy) -> tuple[str, str]:
        return str(copy.dtype), str(copy.target.dtype)

    ordered = sorted(copies, key=lambda copy: (dtypes(copy), copy.parameter))
    for _, alike in itertools.groupby(ordered, key=dtypes):
        held, sent = [], []
        for parameter, group in itertools.groupby(alike, key=lambda copy: copy.parameter):
            some = list(group)
            target, dtype = some[0].target, some[0].dtype
            places = [positions(one.shape, one.target.stride(), int(one.target.storage_offset())) for one in some]
            memory = target.as_strided((target.untyped_storage().nbytes() // target.itemsize,), (1,), 0)
            held.append((parameter, memory, torch.cat(places).to(target.device)))
            sent += [positions(one.shape, one.stride, one.offset // dtype.itemsize) for one in some]
        yield Samples(dtype, tuple(held), elements_of(held), torch.cat(sent).to(target.device))


def elements_of(held: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> Elements | None:
    """Return the elements of parameters (see `Samples.held`), to read them by one kernel; None if there is none."""
    (_, first, _), *_ = held
    if not usable(first.device):
        return None
    addresses = torch.cat([memory.data_ptr() + places * memory.itemsize for _, memory, places in held])
    return Elements(addresses, integer_dtype(first.itemsize))
