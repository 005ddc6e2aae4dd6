"""Versions that lie in a folder on the server's host: whole, or as what has changed since the version before.

If this rank holds the version before, it writes only what has changed into modules that are written in place. Other
modules get their whole tensors from the folder, because vLLM makes something else of them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from millrace_changes import Need, Placed, Tensors
from millrace_words import first_line, listed

from .dry_run import Region
from .errors import RpcError
from .layouts import Layout, layout_of, live_tensor, region_of
from .messages import TensorSpec, take
from .parts import NotPlainError, wanted_of
from .plan import Plan, Target
from .receive import read_folder
from .weights import Weights
from .writing import Writer

log = logging.getLogger("vllm.millrace")


@dataclass(slots=True)
class InPlace:
    """The tensors of a folder of which this rank can write what has changed.

    specs: all of the folder. layout: what these tensors fill; without copies. placed: where their elements go. whole:
    of those that must be loaded whole, why.
    """

    specs: Sequence[TensorSpec]
    layout: Layout
    placed: Placed
    whole: Sequence[str]


class Folders:
    """Loads folders into this rank's model."""

    def __init__(self, plan: Plan, writer: Writer, weights: Weights, device: torch.device) -> None:
        self._plan, self._writer, self._weights, self._device = plan, writer, weights, device
        self._in_place: InPlace | None = None  # of the last folder

    def load(self, bucket: dict[str, Any]) -> dict[str, Any]:
        """Load a version. Returns what `Extension.millrace_load` answers."""
        folder, digest = Path(take(bucket, "path", str)), str(bucket.get("digest", ""))
        tensors = read_folder(folder)
        specs = [TensorSpec(name, t.dtype, tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()]
        targets = self._plan.targets(specs)  # nothing is written if one of them does not fit
        whole, changed, file = "", None, Path()
        if "changes" in bucket:
            changes = take(bucket, "changes", dict)
            file, base = Path(take(changes, "path", str)), take(changes, "base", str)
            if self._weights.digest and base == self._weights.digest:
                changed = self._changeable(specs, targets, tensors)
                if changed.whole:
                    whole = f"{len(changed.whole)} of its {len(specs)} tensors, because {changed.whole[0]}"
            else:
                whole = "a version, because its rank holds another one than the changes are from"
        samples, ignored = dict[str, str](), list[str]()
        for spec, target, tensor in zip(specs, targets, tensors.values(), strict=True):
            if changed is not None and spec.name in changed.layout.names:
                continue
            # Of a tensor that this rank does not use, only the samples are read, on the CPU.
            device = self._device if target.module is not None else tensor.device
            layout, content = self._layout_of(spec, target), tensor.reshape(-1).view(torch.uint8)
            samples[spec.name] = self._weights.load(layout, lambda: content.to(device))  # noqa: B023
            ignored += layout.ignored
        if changed is not None and changed.layout.names:
            samples |= self._change(changed, folder, file, tensors)
        self._weights.arrived(digest, tensors.keys())
        count = 0 if changed is None else len(changed.layout.names)
        log.info("%s: of %d of its %d tensors only what has changed was written", folder, count, len(tensors))
        joined = "".join(samples[name] for name in tensors)
        return {"names": list(tensors), "samples": joined, "ignored": listed(ignored), "whole": whole}

    def _changeable(self, specs: Sequence[TensorSpec], targets: Sequence[Target], tensors: Tensors) -> InPlace:
        """The tensors of which what has changed can be written. It is planned again if the model has moved."""
        if self._in_place is None or self._in_place.specs != specs or not self._in_place.layout.fits:
            self._in_place = in_place_of(specs, targets, tensors, self._plan, self._writer.in_place)
        return self._in_place

    def _change(self, changed: InPlace, folder: Path, changes: Path, tensors: Tensors) -> dict[str, str]:
        """Write what has changed, and compare the parameters with the folder. Returns their sampled checksums."""
        own = {name: tensors[name] for name in changed.layout.names}

        def write() -> None:
            try:
                changed.placed.write(changes, own)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise RpcError(f"could not write what has changed, from {changes}: {first_line(error)}") from error
            if wrong := changed.placed.differing(own):
                raise RpcError(f"{listed(wrong)} do not hold what is in {folder}")

        self._weights.change(changed.layout, tensors, write)
        samples: dict[str, str] = changed.placed.checksums(own)
        return samples

    def _layout_of(self, spec: TensorSpec, target: Target) -> Layout:
        return layout_of([spec], [target], self._plan, self._writer.in_place, self._writer.processed_last)


def in_place_of(
    specs: Sequence[TensorSpec],
    targets: Sequence[Target],
    tensors: Tensors,
    plan: Plan,
    in_place: Callable[[str], bool],
) -> InPlace:
    """Plan what can be written of the tensors of a folder. in_place: as for `layout_of`."""
    needs, whole, regions = dict[str, list[Need]](), list[str](), dict[str, set[Region]]()
    layout = Layout(specs, frozenset(), 0)
    names = Counter(target.shared for target in targets)
    for index, (spec, target) in enumerate(zip(specs, targets, strict=True)):
        if target.module is None:
            continue
        try:
            wanted = wanted_of(spec, target, set() if in_place(target.module) else {target.module})
        except NotPlainError as error:
            whole.append(str(error))
            continue
        module = plan.modules[target.module]
        needs[spec.name] = [
            Need(f"{target.module}.{one.name}", region_of(live_tensor(module, one.name), one), box, along)
            for one, box, along in wanted.needs
        ]
        for region, value in wanted.constants.items():
            assert isinstance(value, float)
            layout.fills.append((region_of(live_tensor(module, region.name), region), value))
        regions.setdefault(target.module, set()).update(target.regions)
        if target.shared is not None and names[target.shared] > 1:  # otherwise there is nothing to compare it with
            layout.ties.append((target.shared, index))
    layout.names = frozenset(needs)
    layout.hold(regions, plan, in_place)
    return InPlace(specs, layout, Placed({name: tensors[name] for name in needs}, needs), whole)
