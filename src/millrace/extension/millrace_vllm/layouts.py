"""What a bucket of one layout does to this rank's model: worked out once, and replayed for each such bucket."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from millrace_copies import Copies, Slice, fused
from millrace_samples import SampledPlaces, SampledTensors, separated
from millrace_words import listed

from .dry_run import Region, View
from .errors import RpcError
from .messages import TensorSpec
from .plan import Plan, Target


class Part(NamedTuple):
    """A sent tensor that the model's own loader must load. place: its index in the bucket."""

    place: int
    module: str
    dtype: torch.dtype  # the model's


class Held(NamedTuple):
    """A tensor of the model, and where its memory was when a layout was planned."""

    module: torch.nn.Module
    name: str
    tensor: torch.Tensor
    address: int

    @property
    def is_there(self) -> bool:
        return tensor_of(self.module, self.name) is self.tensor and self.tensor.data_ptr() == self.address


# Tensors of a layout by their numbers, and what returns their checksums for a bucket.
Sampled = tuple[list[int], Callable[[torch.Tensor], list[str]]]


@dataclass(slots=True)
class Writes:
    """What is written into memory beside the model, for one module. copies: by the name of the module's tensor, into
    tensors without memory that have its form. fills: regions that are filled with a number."""

    copies: dict[str, list[Copies]] = field(default_factory=dict)
    fills: list[tuple[Region, float]] = field(default_factory=list)


@dataclass(slots=True)
class Layout:
    """The plan of one layout.

    nbytes: the least size of the bucket. ignored: the sent names that this rank does not use. ties: for each tensor of
    a parameter that several modules have, the parameter's name and the index in the bucket. regions, counts: of each
    module, the regions that the bucket fills and the elements of each tensor. direct, fills: copies and constants that
    are written into the model. staged: by module, what is written into memory beside the model, where vLLM processes
    it. parts: what the model's own loader loads. unchanged: for each sent tensor, the model's own that receives it
    unchanged, or None. held: the model's tensors in `direct`. due: modules that the update must fill, besides
    those that it fills in part.
    """

    specs: Sequence[TensorSpec]
    names: frozenset[str]
    nbytes: int
    ignored: list[str] = field(default_factory=list)
    ties: list[tuple[str, int]] = field(default_factory=list)
    regions: Mapping[str, frozenset[Region]] = field(default_factory=dict)
    counts: Mapping[str, Counter[str]] = field(default_factory=dict)
    direct: list[Copies] = field(default_factory=list)
    fills: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    staged: dict[str, Writes] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    unchanged: list[torch.Tensor | None] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    due: frozenset[str] = frozenset()
    _samples: tuple[Sampled, ...] = ()

    def samples(self, bucket: torch.Tensor) -> str:
        """The sampled checksum of each tensor, one after the other: of the tensor in the model, if it receives the sent
        one unchanged, and else of the one in the bucket, which can be on another device."""
        if not self._samples:
            self._samples = self._sampled(bucket.device)
        found = [""] * len(self.specs)
        for indices, checksums in self._samples:
            for index, value in zip(indices, checksums(bucket), strict=True):
                found[index] = value
        return "".join(found)

    def _sampled(self, device: torch.device) -> tuple[Sampled, Sampled]:
        here = [index for index, tensor in enumerate(self.unchanged) if tensor is not None]
        others = [index for index, tensor in enumerate(self.unchanged) if tensor is None]
        held = SampledTensors([tensor for tensor in self.unchanged if tensor is not None])
        sent = [self.specs[index] for index in others]
        sizes = [(spec.dtype.itemsize, spec.nbytes // spec.dtype.itemsize, spec.offset) for spec in sent]
        arrived = SampledPlaces(sizes, device)
        return (here, lambda _: held.checksums()), (others, lambda bucket: separated(arrived.checksums(bucket)))

    def hold(self, regions: Mapping[str, set[Region]], plan: Plan, in_place: Callable[[str], bool]) -> None:
        """Note what the layout fills, and which tensors of the model it is planned for."""
        self.regions = {path: frozenset(some) for path, some in regions.items()}
        self.counts = {path: count(some) for path, some in self.regions.items()}
        live = ((plan.modules[path], name) for path in self.counts if in_place(path) for name in self.counts[path])
        tensors = [(module, name, live_tensor(module, name)) for module, name in live]
        self.held = [Held(module, name, tensor, tensor.data_ptr()) for module, name, tensor in tensors]

    @property
    def fits(self) -> bool:
        """Whether the model's tensors are where they were when the layout was planned."""
        return all(one.is_there for one in self.held)


def layout_of(
    specs: Sequence[TensorSpec],
    targets: Sequence[Target],
    plan: Plan,
    in_place: Callable[[str], bool],
    last: set[str],
) -> Layout:
    """Plan a layout. Raises RpcError if a tensor comes twice.

    targets: of the tensors. in_place: whether tensors are written into a module of the model itself. last: modules that
    vLLM processes last.
    """
    layout = Layout(specs, frozenset(spec.name for spec in specs), max((s.offset + s.nbytes for s in specs), default=0))
    if len(layout.names) < len(specs):
        names = Counter(spec.name for spec in specs)
        raise RpcError(f"sent twice in one update: {listed(name for name in names if names[name] > 1)}")
    regions: dict[str, set[Region]] = {}
    copies: dict[tuple[str, str], list[tuple[torch.Tensor, Slice]]] = {}
    for index, (spec, target) in enumerate(zip(specs, targets, strict=True)):
        if target.shared is not None:
            layout.ties.append((target.shared, index))
        if target.module is None:
            layout.unchanged.append(None)
            if target.shared is None:
                layout.ignored.append(spec.name)
            continue
        path, here = target.module, in_place(target.module)
        regions.setdefault(path, set()).update(target.regions)
        layout.unchanged.append(unchanged(spec, target, plan.modules[path]) if here else None)
        if target.unplanned is not None or path in last:
            layout.parts.append(Part(index, path, target.dtype))
            continue
        for region, origin in target.regions.items():
            into = live_tensor(plan.modules[path], region.name) if here else plan.forms[path, region.name]
            if isinstance(origin, View):
                pair = region_of(into, region), slice_of(spec, region, origin)
                copies.setdefault(("", "") if here else (path, region.name), []).append(pair)
            elif here:
                layout.fills.append((region_of(into, region), origin))
            else:
                layout.staged.setdefault(path, Writes()).fills.append((region, origin))
    layout.direct = fused(copies.pop(("", ""), ()))
    for (path, name), pairs in copies.items():
        layout.staged.setdefault(path, Writes()).copies[name] = fused(pairs)
    layout.hold(regions, plan, in_place)
    return layout


def slice_of(spec: TensorSpec, region: Region, view: View) -> Slice:
    """The elements of a bucket that are copied into a region."""
    return Slice(spec.offset + view.offset * spec.dtype.itemsize, region.sizes, view.strides, spec.dtype)


def unchanged(spec: TensorSpec, target: Target, module: torch.nn.Module) -> torch.Tensor | None:
    """The tensor in the model that receives a sent tensor without any change, or None."""
    whole = [
        region
        for region, origin in target.regions.items()
        if region.sizes == spec.shape and isinstance(origin, View) and slice_of(spec, region, origin).is_contiguous
    ]
    if len(whole) != 1 or target.unplanned is not None:
        return None
    tensor = live_tensor(module, whole[0].name)
    view = region_of(tensor, whole[0])
    return view if tensor.dtype is spec.dtype and view.is_contiguous() else None


def region_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The elements of a tensor that a region names."""
    return tensor.detach().as_strided(region.sizes, region.strides, tensor.storage_offset() + region.offset)


def tensor_of(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer of a module itself."""
    return module._parameters.get(name, module._buffers.get(name))


def live_tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer that the module has."""
    tensor = tensor_of(module, name)
    assert tensor is not None
    return tensor


def count(regions: frozenset[Region] | set[Region]) -> Counter[str]:
    """The elements of each tensor in some regions of a module."""
    counts: Counter[str] = Counter()
    for region in regions:
        counts[region.name] += region.elements
    return counts
