"""Updates that bring each rank only the parts of the tensors that it needs.

First the sender asks which parts those are (`dry_run`). Then it sends buckets of parts. The copies of each bucket
layout are planned once, as for whole tensors.
"""

import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from millrace_boxes import read_box
from millrace_parts import Part, piece_of
from millrace_samples import SampledPlaces, separated
from millrace_words import listed

from .dry_run import Description, Sent, described
from .held import Held
from .plan import Plan, plan_of
from .recording import Copy, Memory, Recording

LISTED = 5  # names in an answer


@dataclass(slots=True)
class Layout:
    """One layout of a bucket: the labels of its parts, what the checksums read, and its plan. update: the last one that
    had such a bucket."""

    labels: tuple[str, ...]
    places: SampledPlaces
    plan: Plan
    update: str = ""

    @classmethod
    def of(cls, parts: Sequence[Part], bucket: torch.Tensor, description: Description) -> "Layout":
        """Plan a layout, for buckets of this size. Raises ValueError if a part is not inside, or not needed."""
        for part in parts:
            if part.offset % part.dtype.itemsize or not 0 <= part.offset <= part.offset + part.nbytes <= bucket.nbytes:
                raise ValueError(f"a part can't be at offset {part.offset} of a bucket of {bucket.nbytes} bytes")
        sizes = [(part.dtype.itemsize, part.nbytes // part.dtype.itemsize, part.offset) for part in parts]
        labels = tuple(part.label for part in parts)
        return cls(labels, SampledPlaces(sizes, bucket.device), plan_of_parts(parts, description))


@dataclass(slots=True)
class Parts:
    """What is known of one model and its open update.

    sent: the tensors of an update. description: what this rank copies of them. held: the parameters that it was found
    for. written: how many elements of each parameter the open update has written.
    """

    sent: tuple[Sent, ...] = ()
    description: Description | None = None
    held: Held = field(default_factory=lambda: Held({}, {}))
    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    update: str = ""
    written: Counter[str] = field(default_factory=Counter)

    def describe(self, model: torch.nn.Module, sent: Sequence[Sent]) -> Mapping[str, object]:
        """Return the boxes of each tensor that this rank needs, in the tensors' order, or why that can't be said."""
        self.sent, self.held, self.update = tuple(sent), Held.by(model), ""
        self.layouts.clear()
        found = described(getattr(model, "load_weights", None), Memory(model.named_parameters()), sent)
        if isinstance(found, str):
            self.description = None
            return {"unplanned": found}
        self.description = found
        return {"boxes": [found.boxes(name) for name, _, _ in sent]}

    def load(self, model: torch.nn.Module, update: str, text: str, bucket: torch.Tensor) -> Mapping[str, object]:
        """Load a bucket of parts, [nbytes] uint8, and return the answer. Raises ValueError if it can't be loaded."""
        if update != self.update and self.description is not None and self.held.addresses != Held.by(model).addresses:
            self.describe(model, self.sent)
        if self.description is None:
            raise ValueError("this rank has not said which parts it needs")
        if update != self.update:
            self.layouts = {key: one for key, one in self.layouts.items() if one.update == self.update}
            self.update, self.written = update, self.description.fill()
        key = text, bucket.nbytes
        layout = self.layouts.get(key) or Layout.of(read_parts(text), bucket, self.description)
        self.layouts[key], layout.update = layout, update
        samples = layout.places.begin(bucket)
        if layout.plan.copies:  # another rank may have a part in a bucket that has none for this one
            layout.plan.run(bucket)
        differing = layout.plan.compare(bucket)
        samples_of = dict(zip(layout.labels, separated(samples()), strict=True))
        if wrong := differing():
            raise ValueError(f"{listed(wrong)} do not hold what was copied into them")
        self.written.update(layout.plan.elements)
        missing = self.held.missing(self.written)
        return {"samples": samples_of, "missing": len(missing), "such as": missing[:LISTED]}


OF_MODELS: "weakref.WeakKeyDictionary[torch.nn.Module, Parts]" = weakref.WeakKeyDictionary()


def answer(model: torch.nn.Module, update: str, text: str, bucket: torch.Tensor) -> Mapping[str, object]:
    """Do what an order about parts says, and return the answer.

    text: {"needs": [[name, dtype, shape], ...]} asks for this rank's parts, and {"parts": [[name, dtype, box, offset],
    ...]} loads the bucket. Raises what can't be done.
    """
    parts = OF_MODELS.setdefault(model, Parts())
    if text.startswith('{"needs"'):
        asked = json.loads(text)["needs"]
        return parts.describe(model, [(str(name), getattr(torch, dtype), tuple(shape)) for name, dtype, shape in asked])
    return parts.load(model, update, text, bucket)


def read_parts(text: str) -> tuple[Part, ...]:
    """Read the parts of a bucket. Raises what a text in another form makes."""
    return tuple(
        Part(str(name), getattr(torch, dtype), read_box(box), int(at))
        for name, dtype, box, at in json.loads(text)["parts"]
    )


def plan_of_parts(parts: Sequence[Part], description: Description) -> Plan:
    """Return the copies that load a bucket. Raises ValueError if it has a part of a tensor that this rank does not
    need."""
    recording = Recording()
    for part in parts:
        if part.name not in description.needs:
            raise ValueError(f"this rank does not need {part.label}")
        for need in description.needs[part.name]:
            if (piece := piece_of(part, need.box, need.along)) is None:
                continue
            target, source = need.target, piece.source
            for dim, (start, size) in enumerate(zip(piece.starts, source.shape, strict=True)):
                target = target.narrow(dim, start, size)
            recording.copies.append(
                Copy(need.parameter, target, source.offset, source.shape, source.stride, source.dtype)
            )
    plan = plan_of(recording)
    if isinstance(plan, str):
        raise ValueError(plan)
    return plan
