"""Which parts of an update's tensors this rank copies into its model, and where a part that arrives goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from millrace_boxes import Box, box_of, disjoint, shape_of
from millrace_parts import Part, piece_of

from .dry_run import Origins, Region, View
from .errors import RpcError
from .messages import TensorSpec
from .plan import Target


class NotPlainError(Exception):
    """This rank does something else with a tensor than copying boxes of it. The message says what."""


class Need(NamedTuple):
    """A region of a module that is a copy of a box of a tensor. along: which dimension of the tensor each dimension of
    the region goes along; None for one with a single element."""

    region: Region
    box: Box
    along: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What this rank takes of one tensor. constants: regions that are set when any part of the tensor arrives, such as
    the padding of a vocabulary."""

    target: Target
    needs: tuple[Need, ...]
    constants: Origins


class Needs:
    """What this rank takes of an update's tensors. Raises NotPlainError if it does more than copy boxes.

    processed: modules that vLLM itself loads, from whole tensors.
    """

    def __init__(self, specs: Sequence[TensorSpec], targets: Sequence[Target], processed: set[str]) -> None:
        self._wanted: Mapping[str, Wanted] = {
            spec.name: wanted_of(spec, target, processed)
            for spec, target in zip(specs, targets, strict=True)
            if target.module is not None
        }
        modules = (one.target.module for one in self._wanted.values())
        self.modules = frozenset(module for module in modules if module is not None)

    def boxes(self, name: str) -> list[Box]:
        """The boxes of a tensor that this rank needs, which do not overlap. Empty if it needs none of it."""
        wanted = self._wanted.get(name)
        return [] if wanted is None else disjoint(need.box for need in wanted.needs)

    def specs(self, parts: Sequence[Part]) -> list[TensorSpec]:
        """The parts as tensors of a bucket."""
        return [TensorSpec(part.label, part.dtype, shape_of(part.box), part.offset, part.nbytes) for part in parts]

    def targets(self, parts: Sequence[Part]) -> list[Target]:
        """The target of each part. Raises RpcError for a part that this rank does not need."""
        return [self._target(part) for part in parts]

    def _target(self, part: Part) -> Target:
        wanted = self._wanted.get(part.name)
        regions: dict[Region, View | float] = {}
        for need in wanted.needs if wanted is not None else ():
            if (piece := piece_of(part, need.box, need.along)) is not None:
                source, (name, offset, _, strides) = piece.source, need.region
                ahead = sum(start * step for start, step in zip(piece.starts, strides, strict=True))
                view = View((source.offset - part.offset) // part.dtype.itemsize, source.stride)
                regions[Region(name, offset + ahead, source.shape, strides)] = view
        if wanted is None or not regions:
            raise RpcError(f"this rank does not need {part.label}")
        return replace(wanted.target, regions=regions | wanted.constants, shared=None)


def wanted_of(spec: TensorSpec, target: Target, processed: set[str]) -> Wanted:
    """What a rank takes of a tensor. Raises NotPlainError if it does more than copy boxes of it."""
    if target.unplanned is not None:
        raise NotPlainError(f"{spec.name}: {target.unplanned}")
    if target.module in processed:
        raise NotPlainError(f"{spec.name}: vLLM itself loads {target.module}")
    needs: list[Need] = []
    constants: Origins = {}
    for region, origin in target.regions.items():
        if not isinstance(origin, View):
            constants[region] = origin
            continue
        found = box_of(spec.shape, origin.offset, region.sizes, origin.strides)
        if found is None:
            raise NotPlainError(f"{spec.name}: the loader copies no rectangular part of it")
        needs.append(Need(region, *found))
    return Wanted(target, tuple(needs), constants)
