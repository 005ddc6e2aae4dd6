"""Versions that lie in a folder on the server's host: whole, or as what has changed since the version before.

SGLang itself reads a whole folder. Then this rank compares its parameters with the folder. If it holds the version
before, it can also write only what has changed: the places of all elements are known from a dry run (`dry_run`).
"""

import functools
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from millrace_boxes import elements, strides_of
from millrace_samples import integer_dtype, sampled_checksums
from millrace_words import listed
from safetensors import safe_open

from .dry_run import Description, Need, Sent, described
from .held import addresses_of
from .plan import positions
from .recording import Memory

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Folders:
    """What is known of one model.

    sent: the tensors of the last folder. description: what this rank copies of them, found when the parameters had
    these `addresses`; a text is why that can't be said. compared: whether the parameters were found to hold a folder.
    """

    sent: tuple[Sent, ...] = ()
    description: Description | str = "no folder was read"
    addresses: Mapping[str, int] = field(default_factory=dict)
    compared: bool = False

    def take(self, model: torch.nn.Module, folder: Path, changes: Path | None) -> Mapping[str, object]:
        """Write what has changed, if there is a file of it, and compare the parameters with the folder. Return the
        answer. Raises what can't be done."""
        tensors = read_folder(folder)
        self._describe(model, tensors)
        if isinstance(self.description, str):
            if changes is not None:
                raise ValueError(self.description)
            return {"unplanned": self.description}
        if changes is not None:
            write_changes(changes, tensors, self.description)
        if wrong := differing(tensors, self.description):
            why = f"{listed(wrong)} do not hold what is in {folder}"
            if changes is None and not self.compared:  # SGLang may do more with weights than its loader shows
                return {"unplanned": why}
            raise ValueError(why)
        self.compared = True
        return {"samples": samples_of(tensors, self.description)}

    def _describe(self, model: torch.nn.Module, tensors: Tensors) -> None:
        sent = tuple((name, one.dtype, tuple(one.shape)) for name, one in tensors.items())
        addresses = addresses_of(model.named_parameters())
        if (sent, addresses) != (self.sent, self.addresses):
            memory = Memory(model.named_parameters())
            self.description = described(getattr(model, "load_weights", None), memory, sent)
            self.sent, self.addresses = sent, addresses


OF_MODELS: "weakref.WeakKeyDictionary[torch.nn.Module, Folders]" = weakref.WeakKeyDictionary()


def answer(model: torch.nn.Module, text: str) -> Mapping[str, object]:
    """Do what an order about a folder says, and return the answer.

    text: {"folder": path} after SGLang has read the folder, or {"folder": path, "changes": path} in place of that.
    Raises what can't be done.
    """
    asked = json.loads(text)
    changes = Path(asked["changes"]) if "changes" in asked else None
    with torch.no_grad():
        return OF_MODELS.setdefault(model, Folders()).take(model, Path(asked["folder"]), changes)


def read_folder(folder: Path) -> Tensors:
    """Return the tensors of a version's folder, on the CPU and memory-mapped."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    if not tensors:
        raise ValueError(f"{folder} has no safetensors files on this host")
    return dict(sorted(tensors.items()))  # the same for every version, however its files are cut


def write_changes(path: Path, tensors: Tensors, description: Description) -> None:
    """Write what has changed into the parameters. tensors: of the new version."""
    with safe_open(path, framework="pt") as file:
        for name in json.loads(file.metadata()["whole"]):
            for need in description.needs.get(name, ()):
                need.target.copy_(source_of(tensors[name], need))
        for part in file.keys():  # noqa: SIM118  # it is not a mapping
            name = part.removeprefix("at/")
            if name != part and (needs := description.needs.get(name)):
                at, values = file.get_tensor(part), file.get_tensor(f"to/{name}")
                scatter(tensors[name].shape, needs, at, values)


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


def samples_of(tensors: Tensors, description: Description) -> dict[str, str]:
    """Return the sampled checksum of each tensor. It is of the parameter that holds the tensor as it is, or else of the
    tensor in the folder."""
    found: dict[str, str] = {}
    held = {name: held_whole(one, description.needs.get(name, ())) for name, one in tensors.items()}
    for here in (True, False):
        chosen = {name: one if here else tensors[name] for name, one in held.items() if (one is not None) is here}
        found |= zip(chosen, sampled_checksums([one for one in chosen.values() if one is not None]), strict=True)
    return found


def differing(tensors: Tensors, description: Description) -> list[str]:
    """Return the parameters that differ from the tensors, by samples of what each copy takes."""
    parameters: list[str] = []
    unlike: list[torch.Tensor] = []
    for name, needs in description.needs.items():
        for need in needs:
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
