"""The versions of a rank's weights: the open update, and the traces of abandoned ones."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from millrace_samples import sampled_checksums
from millrace_words import listed

from .digest import digest
from .dry_run import Region
from .errors import RpcError
from .messages import TensorSpec
from .plan import Plan, Target
from .writing import Part, Writer


@dataclass(slots=True)
class Update:
    """The tensors that have arrived since `begin`.

    filled: the regions that they fill in each module, with their elements. staged: copies of the parts of incomplete
    modules. overwritten: the modules that no longer contain the old version. shared: for a parameter that can arrive
    under several names, the digest under each name."""

    sent: set[str] = field(default_factory=set)
    filled: dict[str, dict[Region, int]] = field(default_factory=dict)
    staged: dict[str, list[Part]] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    shared: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    unchanged: dict[str, torch.Tensor] = field(default_factory=dict)  # the model's own, equal to the sent tensors
    samples: dict[str, str] = field(default_factory=dict)  # of all other sent tensors
    failed: bool = False  # a load failed half-way, so the content of the model is not known

    def count(self, module: str, name: str) -> int:
        """The number of elements of a module's tensor that have arrived."""
        return sum(elements for region, elements in self.filled.get(module, {}).items() if region.name == name)


class Weights:
    """A rank's weights: `version` is what they are, `update` is the open update."""

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self._plan, self._writer = plan, writer
        self.update: Update | None = None
        self.version: str | None = None
        self._stale: set[str] = set()  # modules that contain weights of an abandoned update

    def begin(self) -> None:
        if self.update is not None:
            raise RpcError("an update is open already; commit or abandon it first")
        self.update = Update()

    def load(self, specs: list[TensorSpec], fetch: Callable[[], list[torch.Tensor]]) -> list[str]:
        """Load the tensors that `fetch` returns for `specs`. Returns the names that this rank does not use.

        The tensors' memory belongs to the sender, and nothing uses it after the call."""
        update = self._open_update()
        targets = self._plan.targets(specs)
        counts = Counter([*update.sent, *(spec.name for spec in specs)])
        if twice := {name for name, count in counts.items() if count > 1}:
            raise RpcError(f"sent twice in one update: {listed(twice)}")
        tensors = fetch()
        update.failed = True
        update.sent.update(spec.name for spec in specs)
        in_place: list[Part] = []
        waiting: dict[str, list[Part]] = {}
        for spec, target, tensor in zip(specs, targets, tensors, strict=True):
            if target.shared is not None:
                update.shared.setdefault(target.shared, {})[spec.name] = digest(tensor).cpu()
            if target.module is not None:
                update.filled.setdefault(target.module, {}).update(target.regions)
                direct = self._writer.in_place(target.module)
                parts = in_place if direct else waiting.setdefault(target.module, [])
                parts.append(Part(spec.name, tensor, target.dtype))
                if direct:
                    update.overwritten.add(target.module)
        self._sample(update, specs, targets, tensors)
        complete = {m for m in waiting if self._is_complete(update, m) and m not in self._writer.processed_last}
        for module in waiting.keys() - complete:
            copies = (part._replace(tensor=part.tensor.to(part.dtype, copy=True)) for part in waiting[module])
            update.staged.setdefault(module, []).extend(copies)
        ready = (part for module in complete for part in update.staged.pop(module, []) + waiting[module])
        self._write(update, complete, [*in_place, *ready])
        update.failed = False
        return [
            spec.name for spec, target in zip(specs, targets, strict=True) if target.module is None is target.shared
        ]

    def commit(self, version: str) -> None:
        """Finish the open update, whose weights become `version`. Raises RpcError for an incomplete update."""
        update = self._open_update()
        if not update.sent:
            raise RpcError("nothing was loaded; load the weights, or abandon the update")
        self._require_complete(update)
        update.failed = True
        self._write(update, self._writer.processed_last, [part for parts in update.staged.values() for part in parts])
        self.update, self.version = None, version
        self._stale.clear()

    def abandon(self) -> bool:
        """Give the open update up. Returns whether modules contain weights of this or an earlier abandoned update."""
        if self.update is not None:
            self._stale |= self.update.overwritten
            self.update = None
        if self._stale:
            self.version = None
        return bool(self._stale)

    def sampled_checksums(self) -> dict[str, str]:
        """A checksum of a sample of each sent tensor, by its name. It is taken from the model if the model contains the
        tensor unchanged; otherwise it was taken when the tensor arrived."""
        update = self._open_update()
        in_model = sampled_checksums(list(update.unchanged.values()))
        return update.samples | dict(zip(update.unchanged, in_model, strict=True))

    def _sample(
        self, update: Update, specs: list[TensorSpec], targets: list[Target], tensors: list[torch.Tensor]
    ) -> None:
        """Prepare `sampled_checksums` for tensors that have arrived."""
        in_model = [self._unchanged(spec, target) for spec, target in zip(specs, targets, strict=True)]
        update.unchanged |= {s.name: tensor for s, tensor in zip(specs, in_model, strict=True) if tensor is not None}
        others = [index for index, tensor in enumerate(in_model) if tensor is None]
        sums = sampled_checksums([tensors[index].contiguous() for index in others])
        update.samples |= {specs[index].name: value for index, value in zip(others, sums, strict=True)}

    def _unchanged(self, spec: TensorSpec, target: Target) -> torch.Tensor | None:
        """The tensor in the model that receives a sent tensor without any change, or None."""
        regions = [region for region in target.regions if region.sizes == spec.shape]
        if target.module is None or not self._writer.in_place(target.module) or len(regions) != 1:
            return None
        [region] = regions
        module = self._plan.modules[target.module]
        tensor = module._parameters.get(region.name, module._buffers.get(region.name))
        if tensor is None or tensor.dtype is not spec.dtype:
            return None
        view = tensor.detach().as_strided(region.sizes, region.strides, tensor.storage_offset() + region.offset)
        return view if view.is_contiguous() else None

    def _open_update(self) -> Update:
        if self.update is None:
            raise RpcError("no update is open; begin one first")
        if self.update.failed:
            raise RpcError("a load of this update failed half-way; abandon it")
        return self.update

    def _write(self, update: Update, complete: set[str], parts: list[Part]) -> None:
        update.overwritten |= complete & update.filled.keys()
        self._writer.write(complete, parts)

    def _require_complete(self, update: Update) -> None:
        incomplete = {module for module in update.filled if not self._is_complete(update, module)}
        if incomplete:
            module = min(incomplete)
            lacking = ", ".join(
                f"{name} has {count} of {needed} elements"
                for name, needed in self._plan.needed[module].items()
                if (count := update.count(module, name)) < needed
            )
            raise RpcError(f"the update has only parts of {listed(incomplete)} (of {module}: {lacking})")
        if left := self._stale - update.filled.keys():
            raise RpcError(f"an update that was given up has changed {listed(left)}; send these too")
        for parameter, digests in update.shared.items():
            if parameter.rpartition(".")[0] not in update.filled:
                raise RpcError(f"{listed(digests)} came without {parameter}, although the model ties them")
            if len({tuple(sums.tolist()) for sums in digests.values()}) > 1:
                raise RpcError(f"{listed(digests)} are one tensor in the model, but differ in the update")

    def _is_complete(self, update: Update, module: str) -> bool:
        return all(update.count(module, name) >= elements for name, elements in self._plan.needed[module].items())
