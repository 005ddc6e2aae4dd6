"""Writes what has changed between two versions into the parameters that hold the older one, and compares parameters
with the newer one. Extensions of engines run this file.

What has changed is in a safetensors file: of each tensor that has changed in part, the positions `at/NAME` of the
elements, ascending, and their values `to/NAME`. The metadata `whole` names the tensors of which too much has changed.

A mixture of experts has thousands of tensors, and the engine waits meanwhile. So copies that are alike are one group,
and each group takes few calls of torch.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from millrace_boxes import Box, elements, strides_of
from millrace_files import mapped_tensors
from millrace_samples import SampledTensors, integer_dtype, sampled_checksums

SAMPLED = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}  # about so many places along each dimension of a copy are compared
TOGETHER = 2**22  # changed elements that are written at once; they take 32 bytes each meanwhile


@dataclass(frozen=True, slots=True)
class Need:
    """A copy of a box of a tensor into a parameter.

    target: the place in the parameter. along: which dimension of the tensor each dimension of `target` goes along; None
    for a dimension with a single element.
    """

    parameter: str
    target: torch.Tensor
    box: Box
    along: tuple[int | None, ...]


Tensors = Mapping[str, torch.Tensor]  # of a version's folder, contiguous
Needs = Mapping[str, Sequence[Need]]  # the copies of each tensor


class Placed:
    """Where the tensors of a version go in this rank's parameters.

    tensors: of any version. needs: their copies, which must stay where they are.
    """

    def __init__(self, tensors: Tensors, needs: Needs) -> None:
        self._needs = needs
        self._groups = tuple(groups_of(tensors, needs))
        held = {name: held_whole(one, needs.get(name, ())) for name, one in tensors.items()}
        self._held = [name for name, one in held.items() if one is not None]
        self._sampled = SampledTensors([one for one in held.values() if one is not None])

    def write(self, path: Path, tensors: Tensors) -> None:
        """Write what has changed into the parameters. tensors: of the new version. Raises ValueError and OSError."""
        changes, metadata = mapped_tensors(path)
        for name in json.loads(metadata["whole"]):
            for need in self._needs.get(name, ()):
                need.target.copy_(source_of(tensors[name], need))
        for group in self._groups:
            group.write(changes)

    def differing(self, tensors: Tensors) -> list[str]:
        """Return the parameters that differ from the tensors, by samples of what each copy takes."""
        unlike = [group.unlike(tensors) for group in self._groups]
        found = torch.stack(unlike).tolist() if unlike else []
        return sorted({group.need.parameter for group, one in zip(self._groups, found, strict=True) if one})

    def checksums(self, tensors: Tensors) -> dict[str, str]:
        """Return the sampled checksum of each tensor. It is of the parameter that holds the tensor as it is, or else of
        the tensor itself."""
        found = dict(zip(self._held, self._sampled.checksums(), strict=True))
        others = {name: one for name, one in tensors.items() if name not in found}
        return found | dict(zip(others, sampled_checksums(list(others.values())), strict=True))


@dataclass(frozen=True, slots=True)
class Group:
    """Copies of tensors of one shape and dtype into one parameter, which are alike but for where they begin in it.

    need: one of them. shape: of a tensor. names: of the tensors. memory: what the parameter is a part of, [elements].
    firsts: where in it each copy begins, [copies]. held_at, sent_at: where the samples of a copy lie in `memory`, from
    its first element, and in a tensor, [samples].
    """

    need: Need
    shape: tuple[int, ...]
    names: tuple[str, ...]
    memory: torch.Tensor
    firsts: torch.Tensor
    held_at: torch.Tensor
    sent_at: torch.Tensor

    def write(self, changes: Tensors) -> None:
        """Write the changed elements of all tensors."""
        together: list[int] = []
        size = 0
        for index, name in enumerate(self.names):
            if (at := changes.get(f"at/{name}")) is None:
                continue
            if together and size + at.numel() > TOGETHER:
                self._write(together, changes)
                together, size = [], 0
            together.append(index)
            size += at.numel()
        if together:
            self._write(together, changes)

    def _write(self, indices: list[int], changes: Tensors) -> None:
        """Write the changed elements of some of the tensors at once."""
        device, names = self.memory.device, [self.names[index] for index in indices]
        positions = [changes[f"at/{name}"] for name in names]
        at = torch.cat(positions).to(device).long()
        values = torch.cat([changes[f"to/{name}"] for name in names]).to(device)
        counts = torch.tensor([one.numel() for one in positions], device=device)
        firsts = self.firsts[indices].repeat_interleave(counts, output_size=at.numel())
        taken, places = inside(self.shape, self.need, at)
        cast = values[taken].to(self.memory.dtype)
        integers = integer_dtype(cast.itemsize)  # torch can't index elements of all dtypes
        self.memory.view(integers).index_copy_(0, places + firsts[taken], cast.view(integers))

    def unlike(self, tensors: Tensors) -> torch.Tensor:
        """Return whether a sample of any copy differs from the tensors: a bool without dimensions."""
        integers = integer_dtype(self.memory.itemsize)
        places = (self.firsts[:, None] + self.held_at).flatten()
        held = self.memory.view(integers).index_select(0, places)
        sent = self._sent(tensors).to(self.memory.device).to(self.memory.dtype).view(integers)
        return (held != sent).any()

    def _sent(self, tensors: Tensors) -> torch.Tensor:
        """Return the samples of all tensors, [copies x samples]. Those of tensors of one file are read together."""
        own = [tensors[name] for name in self.names]
        files: dict[int, list[int]] = {}
        for index, one in enumerate(own):
            files.setdefault(one.untyped_storage().data_ptr(), []).append(index)
        integers = integer_dtype(own[0].itemsize)
        sent = torch.empty(len(own), len(self.sent_at), dtype=integers, device=own[0].device)
        for indices in files.values():
            begins = torch.tensor([int(own[index].storage_offset()) for index in indices], device=sent.device)
            places = (begins[:, None] + self.sent_at).flatten()
            read = memory_of(own[indices[0]]).view(integers).index_select(0, places)
            sent[indices] = read.view(len(indices), -1)
        return sent.flatten().view(own[0].dtype)


def groups_of(tensors: Tensors, needs: Needs) -> Iterator[Group]:
    """Yield the groups of all copies."""
    alike: dict[tuple[object, ...], list[tuple[str, Need]]] = {}
    for name, copies in needs.items():
        tensor = tensors[name]
        for need in copies:
            target = need.target
            place = need.parameter, target.untyped_storage().data_ptr(), target.dtype, target.shape, target.stride()
            alike.setdefault((place, tensor.dtype, tensor.shape, need.box, need.along), []).append((name, need))
    for group in alike.values():
        names, some = zip(*group, strict=True)
        need, tensor, target = some[0], tensors[names[0]], some[0].target
        source = source_of(tensor, need)
        yield Group(
            need=need,
            shape=tuple(tensor.shape),
            names=names,
            memory=memory_of(target),
            firsts=torch.tensor([int(one.target.storage_offset()) for one in some], device=target.device),
            held_at=positions(target.shape, target.stride(), 0).to(target.device),
            sent_at=positions(source.shape, source.stride(), int(source.storage_offset() - tensor.storage_offset())),
        )


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements of the memory that a tensor is a part of: [elements]."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


def inside(shape: Sequence[int], need: Need, at: torch.Tensor) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Return which of the positions in a tensor a copy takes, and where they lie in its target's memory, in elements
    from its first one."""
    own = strides_of(shape)
    first = sum(start * step for (start, _), step in zip(need.box, own, strict=True))
    if is_run(shape, need):
        if elements(need.box) == math.prod(shape):
            return slice(None), at
        within = (at >= first) & (at < first + elements(need.box))
        return within, at[within] - first
    chosen: torch.Tensor | None = None
    places = torch.zeros_like(at)
    steps = {along: step for along, step in zip(need.along, need.target.stride(), strict=True) if along is not None}
    for dim, ((start, end), step) in enumerate(zip(need.box, own, strict=True)):
        if shape[dim] == 1:
            continue
        index = at // step % shape[dim]
        if (start, end) != (0, shape[dim]):
            within = (index >= start) & (index < end)
            chosen = within if chosen is None else chosen & within
        if dim in steps:
            places += (index - start) * steps[dim]
    if chosen is None:
        return slice(None), places
    return chosen, places[chosen]


def is_run(shape: Sequence[int], need: Need) -> bool:
    """Return whether a copy is of consecutive elements of a tensor of this shape into consecutive elements."""
    along = [dim for dim in need.along if dim is not None]
    sizes = [end - start for start, end in need.box]
    together = spanned(sizes, strides_of(shape)) == math.prod(sizes)
    return along == sorted(along) and together and need.target.is_contiguous()


def spanned(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one of a box."""
    return sum((size - 1) * step for size, step in zip(sizes, strides, strict=True)) + 1


def source_of(tensor: torch.Tensor, need: Need) -> torch.Tensor:
    """Return the elements of a contiguous tensor that a copy takes, as a view of the target's shape."""
    own = strides_of(tensor.shape)
    strides = [1 if along is None else own[along] for along in need.along]
    first = sum(start * step for (start, _), step in zip(need.box, own, strict=True))
    return tensor.as_strided(need.target.shape, strides, tensor.storage_offset() + first)


def held_whole(tensor: torch.Tensor, needs: Sequence[Need]) -> torch.Tensor | None:
    """Return the part of a parameter that holds a tensor as it is; None if there is none."""
    for need in needs:
        if need.target.dtype is tensor.dtype and elements(need.box) == tensor.numel() and is_run(tensor.shape, need):
            return need.target
    return None


def positions(shape: Sequence[int], stride: Sequence[int], start: int) -> torch.Tensor:
    """Return where evenly spread elements of a strided tensor lie, in elements: [n] int64. Which elements these are
    depends on the shape only."""
    most = SAMPLED.get(len(shape), (math.prod(shape),) * len(shape))
    found = torch.tensor([start])
    for size, step, count in zip(shape, stride, most, strict=True):
        places = torch.arange(0, size, max(1, size // count)) * step
        found = (found[:, None] + places).flatten()
    return found
