"""Writes what has changed between two versions into the parameters that hold the older one, and compares parameters
with the newer one. Extensions of engines run this file.

What has changed is in a safetensors file: of each tensor that has changed in part, the positions `at/NAME` of the
elements, ascending, and their values `to/NAME`. The metadata `whole` names the tensors of which too much has changed.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from millrace_boxes import Box, elements, strides_of
from millrace_samples import integer_dtype, sampled_checksums
from safetensors import safe_open

SAMPLED = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}  # about so many places along each dimension of a copy are compared


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


def write_changes(path: Path, tensors: Tensors, needs: Needs) -> None:
    """Write what has changed into the parameters. tensors: of the new version. Raises SafetensorError and OSError."""
    with safe_open(path, framework="pt") as file:
        for name in json.loads(file.metadata()["whole"]):
            for need in needs.get(name, ()):
                need.target.copy_(source_of(tensors[name], need))
        for part in file.keys():  # noqa: SIM118  # it is not a mapping
            name = part.removeprefix("at/")
            if name != part and (copies := needs.get(name)):
                at, values = file.get_tensor(part), file.get_tensor(f"to/{name}")
                scatter(tensors[name].shape, copies, at, values)


def scatter(shape: Sequence[int], needs: Sequence[Need], at: torch.Tensor, values: torch.Tensor) -> None:
    """Write elements of a tensor into the parameters that hold them.

    shape: of the tensor. at: positions in it, ascending, [n] int32 or int64. values: [n].
    """
    device = needs[0].target.device
    at, values = at.to(device).long(), values.to(device)
    for need in needs:
        target = need.target
        taken, places = inside(shape, need, at)
        cast = values[taken].to(target.dtype)
        integers = integer_dtype(target.itemsize)  # torch can't index elements of all dtypes
        memory = target.as_strided((spanned(target.shape, target.stride()),), (1,)).view(integers)
        memory.index_copy_(0, places, cast.view(integers))


def inside(shape: Sequence[int], need: Need, at: torch.Tensor) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Return which of the positions a copy takes, and where they lie in its target's memory, in elements from its first
    one."""
    own = strides_of(shape)
    first = sum(start * step for (start, _), step in zip(need.box, own, strict=True))
    if is_run(shape, need):
        ends = torch.tensor([first, first + elements(need.box)], device=at.device)
        begin, end = torch.searchsorted(at, ends).tolist()
        taken = slice(begin, end)
        return taken, at[taken] - first
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


def samples_of(tensors: Tensors, needs: Needs) -> dict[str, str]:
    """Return the sampled checksum of each tensor. It is of the parameter that holds the tensor as it is, or else of the
    tensor in the folder."""
    found: dict[str, str] = {}
    held = {name: held_whole(one, needs.get(name, ())) for name, one in tensors.items()}
    for here in (True, False):
        chosen = {name: one if here else tensors[name] for name, one in held.items() if (one is not None) is here}
        found |= zip(chosen, sampled_checksums([one for one in chosen.values() if one is not None]), strict=True)
    return found


def differing(tensors: Tensors, needs: Needs) -> list[str]:
    """Return the parameters that differ from the tensors, by samples of what each copy takes."""
    parameters: list[str] = []
    unlike: list[torch.Tensor] = []
    for name, copies in needs.items():
        for need in copies:
            held = sampled(need.target)
            sent = sampled(source_of(tensors[name], need)).to(held.device).to(held.dtype)
            integers = integer_dtype(held.itemsize)
            parameters.append(need.parameter)
            unlike.append((held.view(integers) != sent.view(integers)).any())
    found = torch.stack(unlike).tolist() if unlike else []
    return sorted({name for name, differs in zip(parameters, found, strict=True) if differs})


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return evenly spread elements of a strided tensor. Which ones depends on its shape only."""
    integers = tensor.as_strided((spanned(tensor.shape, tensor.stride()),), (1,)).view(integer_dtype(tensor.itemsize))
    return integers.index_select(0, places_of(tensor.shape, tensor.stride()).to(tensor.device)).view(tensor.dtype)


@functools.lru_cache(maxsize=1024)
def places_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Return where the samples of a tensor lie. A model has few shapes."""
    return positions(shape, strides, 0)


def positions(shape: Sequence[int], stride: Sequence[int], start: int) -> torch.Tensor:
    """Return where evenly spread elements of a strided tensor lie, in elements: [n] int64. Which elements these are
    depends on the shape only."""
    most = SAMPLED.get(len(shape), (math.prod(shape),) * len(shape))
    found = torch.tensor([start])
    for size, step, count in zip(shape, stride, most, strict=True):
        places = torch.arange(0, size, max(1, size // count)) * step
        found = (found[:, None] + places).flatten()
    return found
