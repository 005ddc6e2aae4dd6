"""Loads the buckets of an update into one model, and answers the sender."""

import json
import logging
import math
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from millrace_receiving import Group, ReceivingGroup
from millrace_samples import SampledPlaces
from millrace_words import first_line, listed

from . import folders, parts
from .answers import AnswerStore, write_answer
from .audit import audit
from .channel import serve
from .held import Held
from .plan import Plan, plan_of
from .recording import Memory, Recorder

log = logging.getLogger(__name__)

LISTED = 5  # names in an answer
Spec = tuple[str, torch.dtype, tuple[int, ...], int]  # of a tensor: name, dtype, shape, offset in bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What the sender says about a bucket.

    update: a name that is new for each update. layout: name, dtype, shape and offset in bytes of each tensor in the
    bucket, as JSON; or an object, which is for `folders`, `parts` or `audit`. file: an open file of the sender for this
    rank's answer; empty if this rank answers in the store of `group`. By it comes the bucket too, under `number` and
    within `seconds`, if the number is not negative.
    """

    update: str
    layout: str
    file: str = ""
    group: Group | None = None
    number: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, text: str) -> "Order":
        """Read an order: a line of JSON, and the layout. Raises what a text in another form makes."""
        head, _, layout = text.partition("\n")
        body = json.loads(head)
        update = str(body["update"])
        if "file" in body:
            return cls(update, layout, str(body["file"]))
        return cls(update, layout, "", Group.read(body["group"]), int(body["number"]), float(body["seconds"]))


@dataclass(slots=True)
class Layout:
    """One layout of a bucket. places: what the checksums read. plan: None before the first bucket; a text is why there
    is none. update: the last one that had such a bucket."""

    specs: tuple[Spec, ...]
    places: SampledPlaces
    plan: Plan | str | None = None
    update: str = ""

    @classmethod
    def of(cls, text: str, bucket: torch.Tensor) -> "Layout":
        """Read a layout for buckets of this size, on this device. Raises ValueError if a tensor is not inside, and what
        a text in another form makes."""
        specs = tuple(
            (str(n), getattr(torch, dtype), tuple(shape), int(at)) for n, dtype, shape, at in json.loads(text)
        )
        for name, dtype, shape, offset in specs:
            if (
                offset % dtype.itemsize
                or not 0 <= offset <= offset + math.prod(shape) * dtype.itemsize <= bucket.nbytes
            ):
                raise ValueError(f"{name} can't be at offset {offset} of a bucket of {bucket.nbytes} bytes")
        sizes = [(dtype.itemsize, math.prod(shape), offset) for _, dtype, shape, offset in specs]
        return cls(specs, SampledPlaces(sizes, bucket.device))

    def views(self, bucket: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors in a bucket's bytes, without a copy."""
        return [
            (name, bucket[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
            for name, dtype, shape, offset in self.specs
        ]


@dataclass(slots=True)
class Loader:
    """What is known of one model and its open update.

    layouts: of the open update and the one before. held: the parameters that the plans were made for. written: how many
    elements of each parameter the open update has written; None if that is not known. receiving: the process group by
    which buckets come. answers: where this rank answers about these buckets.
    """

    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    held: Held = field(default_factory=lambda: Held({}, {}))
    update: str = ""
    written: Counter[str] | None = field(default_factory=Counter)
    receiving: ReceivingGroup | None = None
    answers: AnswerStore | None = None

    def group(self, wanted: Group) -> ReceivingGroup:
        """Return the membership of a group, which begins now if this rank is not in it. It ends that of another group.

        Raises RuntimeError if the group's store can't be reached.
        """
        if self.receiving is None or self.receiving.group.name != wanted.name:
            if self.receiving is not None:
                self.receiving.close()
            self.receiving = self.answers = None
            self.answers, self.receiving = AnswerStore(wanted), ReceivingGroup(wanted)
        return self.receiving

    def load(self, model: torch.nn.Module, order: Order, bucket: torch.Tensor) -> Mapping[str, object]:
        """Load a bucket, [nbytes] uint8, into the model, and return the answer."""
        if order.update != self.update:
            self.layouts = {key: one for key, one in self.layouts.items() if one.update == self.update}
            self.update, self.written = order.update, Counter()
            self.look(model)
        key = order.layout, bucket.nbytes
        layout = self.layouts.get(key) or Layout.of(order.layout, bucket)
        self.layouts[key], layout.update = layout, order.update
        samples = layout.places.begin(bucket)
        if isinstance(layout.plan, Plan):
            layout.plan.run(bucket)
        else:
            layout.plan = record(model, layout.views(bucket), bucket, known=layout.plan)
            self.look(model)  # the model's own loader may replace some parameters
        if isinstance(layout.plan, str):
            self.written = None
            return {"samples": samples(), "unplanned": layout.plan}
        differing = layout.plan.compare(bucket)
        answer: dict[str, object] = {"samples": samples()}  # the GPU has got all its work before this waits for it
        if wrong := differing():
            raise ValueError(f"{listed(wrong)} do not hold what was copied into them")
        if self.written is not None:
            self.written.update(layout.plan.elements)
            missing = self.held.missing(self.written)
            answer |= {"missing": len(missing), "such as": missing[:LISTED]}
        return answer

    def look(self, model: torch.nn.Module) -> None:
        """Look at the model's parameters. Forget all plans if they are elsewhere than before."""
        before, self.held = self.held, Held.by(model)
        if self.held.addresses != before.addresses:
            self.layouts.clear()


def record(
    model: torch.nn.Module, views: Sequence[tuple[str, torch.Tensor]], bucket: torch.Tensor, known: str | None
) -> Plan | str:
    """Load by the model's own loader. Return the plan of the layout, or why there is none.

    known: why there is none, if that was found before.
    """
    load: Any = model.load_weights
    if known is not None:
        load(views)
        return known
    recorder = Recorder(Memory(model.named_parameters()), bucket)
    with recorder:
        load(views)
    plan = plan_of(recorder.recording)
    if isinstance(plan, str):
        log.warning("the model's own loader loads such buckets each time, because it does more than copy: %s", plan)
    return plan


LOADERS: "weakref.WeakKeyDictionary[torch.nn.Module, Loader]" = weakref.WeakKeyDictionary()


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load one bucket, or all buckets that come by a channel: SGLang calls this in each rank.

    named_tensors: one pair, the order and the bucket's bytes; no bytes if the bucket comes by a process group or a
        channel.
    Raises nothing that the order can cause: an exception would end the server. The sender reads in the answer what
    failed.
    """
    [(text, bucket)] = named_tensors
    if text.startswith('{"channel"'):
        load_from_channel(model, json.loads(text), bucket.device)
        return
    try:
        order = Order.read(text)
    except (KeyError, TypeError, ValueError, AttributeError):
        log.exception("an order could not be read")
        return
    loader = LOADERS.setdefault(model, Loader())
    try:
        if order.group is not None:
            receiving = loader.group(order.group)
            if order.number >= 0:
                bucket = receiving.bucket(order.number, order.seconds).to(bucket.device)
        if order.layout.startswith('{"folder"'):
            answer = folders.answer(model, order.layout)
        elif order.layout.startswith('{"audit"'):
            answer = audit(model, order.layout)
        elif order.layout.startswith("{"):
            answer = parts.answer(model, order.update, order.layout, bucket)
        else:
            answer = loader.load(model, order, bucket)
    except Exception as error:
        log.exception("a bucket could not be loaded")
        loader.written = None
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        if bucket.is_cuda:  # after this, nothing reads the bucket's memory; the next one may still be arriving
            torch.cuda.current_stream(bucket.device).synchronize()
    content = json.dumps(answer).encode()
    if order.group is None:
        write_answer(order.file, content)
    elif loader.answers is not None:
        try:
            loader.answers.write(order.number, content)
        except RuntimeError as error:
            log.warning("the answer can't be sent: %s", first_line(error))


def load_from_channel(model: torch.nn.Module, head: Mapping[str, Any], device: torch.device) -> None:
    """Load the buckets that come by a channel. head: where it is, and the first order."""
    from sglang.srt.utils import MultiprocessingSerializer  # type: ignore[import-not-found,unused-ignore]

    def do(payload: str) -> object:
        [(text, bucket)] = MultiprocessingSerializer.deserialize(payload)
        load(model, [(text, bucket.to(device))])
        return bucket

    try:
        serve(head["channel"], head["rank"], head["order"], do)
    except Exception:  # the sender sees that the connection ends
        log.exception("the orders of a channel could not be taken")
