"""The versions of a rank's weights: the open update, and the traces of abandoned ones."""

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import torch
from millrace_copies import copy_out
from millrace_words import listed

from .digest import digest
from .dry_run import Region
from .errors import RpcError
from .layouts import Layout, count
from .messages import TensorSpec
from .plan import Plan
from .receive import view
from .writing import Sent, Staged, Writer


@dataclass(slots=True)
class Update:
    """The tensors that have arrived since `begin`.

    regions: those that they fill in each module. counts: the elements of each of the module's tensors in these regions.
    staged: the parts of incomplete modules. overwritten: the modules that no longer contain the old version. shared:
    for a parameter that can arrive under several names, the digest under each name. due: modules that the update must
    fill. digest: of the folder in which all of it came; empty if it came otherwise."""

    sent: set[str] = field(default_factory=set)
    regions: dict[str, set[Region]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    staged: dict[str, Staged] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    shared: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    due: frozenset[str] = frozenset()
    digest: str = ""
    failed: bool = False  # a load failed half-way, so the content of the model is not known

    def fill(self, layout: Layout) -> None:
        """Count what a bucket of this layout fills."""
        self.due |= layout.due
        for module, regions in layout.regions.items():
            known, counts = self.regions.setdefault(module, set()), self.counts.setdefault(module, Counter())
            counts.update(layout.counts[module] if known.isdisjoint(regions) else count(regions - known))
            known |= regions


class Weights:
    """A rank's weights: `version` is what they are, `update` is the open update. digest: of the folder that they are;
    empty if they came otherwise, and from the first load of an update to its commit."""

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self._plan, self._writer = plan, writer
        self.update: Update | None = None
        self.version: str | None = None
        self.digest = ""
        self._stale: set[str] = set()  # modules that contain weights of an abandoned update

    def begin(self) -> None:
        if self.update is not None:
            raise RpcError("an update is open already; commit or abandon it first")
        self.update = Update()

    def load(self, layout: Layout, fetch: Callable[[], torch.Tensor]) -> str:
        """Load the bucket that `fetch` returns, [nbytes] uint8. Returns `layout.samples`.

        The bucket's memory belongs to the sender, and nothing uses it after the call."""
        self._require_new(layout)
        bucket = fetch()
        if bucket.nbytes < layout.nbytes:
            raise RpcError(f"its tensors need {layout.nbytes} bytes, and the bucket has {bucket.nbytes}")
        update = self._start(layout, lambda spec: view(bucket, spec))
        self._write(update, layout, bucket)
        samples = layout.samples(bucket)
        self._writer.synchronize()
        update.failed = False
        return samples

    def change(self, layout: Layout, tensors: Mapping[str, torch.Tensor], write: Callable[[], None]) -> None:
        """Have `write` make the model hold the tensors of a layout, in modules that are written in place and hold the
        version before. It raises RpcError if they do not hold the tensors then.

        tensors: of the new version."""
        self._require_new(layout)
        update = self._start(layout, lambda spec: tensors[spec.name])
        update.overwritten |= layout.regions.keys()
        with torch.no_grad():
            for tensor, value in layout.fills:
                tensor.fill_(value)
            write()
        self._writer.synchronize()
        update.failed = False

    def arrived(self, digest: str, names: Set[str]) -> None:
        """Note that these tensors of the open update came in a folder."""
        update = self.open_update()
        update.digest = digest if update.sent == names else ""

    def _require_new(self, layout: Layout) -> None:
        if twice := self.open_update().sent & layout.names:
            raise RpcError(f"sent twice in one update: {listed(twice)}")

    def _start(self, layout: Layout, content: Callable[[TensorSpec], torch.Tensor]) -> Update:
        """Count a layout's tensors as arrived. The update has failed until they are written. Returns the update."""
        update = self.open_update()
        update.failed, update.digest, self.digest = True, "", ""
        update.sent |= layout.names
        for parameter, index in layout.ties:
            spec = layout.specs[index]
            update.shared.setdefault(parameter, {})[spec.name] = digest(content(spec)).cpu()
        update.fill(layout)
        return update

    def _write(self, update: Update, layout: Layout, bucket: torch.Tensor) -> None:
        """Write a bucket into the model, and into memory beside it for the modules that are not complete."""
        in_place = {module for module in layout.regions if self._writer.in_place(module)}
        update.overwritten |= in_place
        copy_out(bucket, layout.direct)
        for tensor, value in layout.fills:
            tensor.fill_(value)
        sent: list[Sent] = []
        waiting: dict[str, list[Sent]] = {}
        for index, module, dtype in layout.parts:
            part = Sent(layout.specs[index].name, view(bucket, layout.specs[index]))
            into = sent if module in in_place else waiting.setdefault(module, [])
            into.append(part._replace(tensor=part.tensor.to(dtype)))
        self._writer.load(sent)
        together: dict[str, Staged] = {}
        for module in layout.regions.keys() - in_place:
            staged = update.staged.setdefault(module, Staged(update.regions[module]))
            if module in layout.staged:
                self._writer.stage(module, staged, layout.staged[module], bucket)
            complete = self._is_complete(update, module) and module not in self._writer.processed_last
            parts = waiting.get(module, [])
            staged.parts += parts if complete else [p._replace(tensor=p.tensor.clone()) for p in parts]
            if complete:
                update.overwritten.add(module)
                together[module] = update.staged.pop(module)
                if not staged.parts:
                    self._writer.process({module: together.pop(module)})
        if together:
            self._writer.process(together)

    def commit(self, version: str) -> None:
        """Finish the open update, whose weights become `version`. Raises RpcError for an incomplete update."""
        update = self.open_update()
        if not update.sent:
            raise RpcError("nothing was loaded; load the weights, or abandon the update")
        self._require_complete(update)
        update.failed = True
        last = self._writer.processed_last - (self._writer.inert - update.staged.keys())
        update.overwritten |= last & update.regions.keys()
        self._writer.process({module: update.staged.pop(module, Staged(set())) for module in last})
        self._writer.synchronize()
        self.update, self.version, self.digest = None, version, update.digest
        self._stale.clear()

    def abandon(self) -> bool:
        """Give the open update up. Returns whether modules contain weights of this or an earlier abandoned update."""
        if self.update is not None:
            self._stale |= self.update.overwritten
            self.update = None
        if self._stale:
            self.version = None
        return bool(self._stale)

    def open_update(self) -> Update:
        """The open update. Raises RpcError if there is none, or if it can't go on."""
        if self.update is None:
            raise RpcError("no update is open; begin one first")
        if self.update.failed:
            raise RpcError("a load of this update failed half-way; abandon it")
        return self.update

    def _require_complete(self, update: Update) -> None:
        incomplete = {module for module in update.regions.keys() | update.due if not self._is_complete(update, module)}
        if incomplete:
            module = min(incomplete)
            lacking = ", ".join(
                f"{name} has {have} of {needed} elements"
                for name, needed in self._plan.needed[module].items()
                if (have := update.counts.get(module, Counter[str]())[name]) < needed
            )
            raise RpcError(f"the update has only parts of {listed(incomplete)} (of {module}: {lacking})")
        if left := self._stale - update.regions.keys():
            raise RpcError(f"an update that was given up has changed {listed(left)}; send these too")
        for parameter, digests in update.shared.items():
            if parameter.rpartition(".")[0] not in update.regions:
                raise RpcError(f"{listed(digests)} came without {parameter}, although the model ties them")
            if len({tuple(sums.tolist()) for sums in digests.values()}) > 1:
                raise RpcError(f"{listed(digests)} are one tensor in the model, but differ in the update")

    def _is_complete(self, update: Update, module: str) -> bool:
        counts = update.counts.get(module, Counter[str]())
        return all(counts[name] >= needed for name, needed in self._plan.needed[module].items())
