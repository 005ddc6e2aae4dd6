"""Loads the buckets of an update into one model, and answers the sender."""

import json
import logging
import math
import os
import stat
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from millrace_samples import sampled_checksums
from millrace_words import first_line, listed

from . import parts
from .plan import Plan, plan_of
from .recording import Memory, Recorder

log = logging.getLogger(__name__)

LISTED = 5  # names in an answer
Spec = tuple[str, torch.dtype, tuple[int, ...], int]  # of a tensor: name, dtype, shape, offset in bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What the sender says about a bucket.

    update: a name that is new for each update. answer: an open file of the sender, for this rank. layout: name, dtype,
    shape and offset in bytes of each tensor in the bucket, as JSON; or an object, which is for `parts`.
    """

    update: str
    answer: str
    layout: str

    @classmethod
    def read(cls, text: str) -> "Order":
        """Read an order. Raises what a text in another form makes."""
        body = json.loads(text)
        return cls(str(body["update"]), str(body["answer"]), str(body["layout"]))


@dataclass(slots=True)
class Layout:
    """One layout of a bucket. plan: None before the first bucket; a text is why there is none. update: the last one
    that had such a bucket."""

    specs: tuple[Spec, ...]
    plan: Plan | str | None = None
    update: str = ""


@dataclass(slots=True)
class Loader:
    """What is known of one model and its open update.

    layouts: of the open update and the one before. addresses: of the parameters when the plans were made. written: how
    many elements of each parameter the open update has written; None if that is not known.
    """

    layouts: dict[str, Layout] = field(default_factory=dict)
    addresses: Mapping[str, int] = field(default_factory=dict)
    update: str = ""
    written: Counter[str] | None = field(default_factory=Counter)

    def load(self, model: torch.nn.Module, order: Order, bucket: torch.Tensor) -> Mapping[str, object]:
        """Load a bucket, [nbytes] uint8, into the model, and return the answer."""
        if order.update != self.update:
            self.layouts = {text: one for text, one in self.layouts.items() if one.update == self.update}
            self.update, self.written = order.update, Counter()
        parameters = dict(model.named_parameters())
        addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
        if addresses != self.addresses:
            self.layouts.clear()
            self.addresses = addresses
        layout = self.layouts.get(order.layout) or Layout(read_layout(order.layout))
        self.layouts[order.layout], layout.update = layout, order.update
        views = views_of(layout.specs, bucket)
        samples = sampled_checksums([tensor for _, tensor in views])
        if isinstance(layout.plan, Plan):
            layout.plan.run(bucket)
        else:
            layout.plan = record(model, views, bucket, known=layout.plan)
        answer: dict[str, object] = {"samples": dict(zip([name for name, _ in views], samples, strict=True))}
        if isinstance(layout.plan, str):
            self.written = None
            return {**answer, "unplanned": layout.plan}
        if wrong := layout.plan.differing(bucket):
            raise ValueError(f"{listed(wrong)} do not hold what was copied into them")
        if self.written is not None:
            self.written.update(layout.plan.elements)
            missing = [name for name, one in parameters.items() if self.written[name] < one.numel()]
            answer |= {"missing": len(missing), "such as": sorted(missing)[:LISTED]}
        return answer


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
    """Load one bucket: SGLang calls this in each rank.

    named_tensors: one pair, the order as JSON and the bucket's bytes. Raises nothing that the order can cause: an
    exception would end the server. The sender reads in the answer what failed.
    """
    [(text, bucket)] = named_tensors
    try:
        order = Order.read(text)
    except (KeyError, TypeError, ValueError, AttributeError):
        log.exception("an order could not be read")
        return
    loader = LOADERS.setdefault(model, Loader())
    try:
        if order.layout.startswith("{"):
            answer = parts.answer(model, order.update, order.layout, bucket)
        else:
            answer = loader.load(model, order, bucket)
    except Exception as error:
        log.exception("a bucket could not be loaded")
        loader.written = None
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        if bucket.is_cuda:
            torch.cuda.synchronize(bucket.device)  # after this, nothing reads the bucket's memory
    write_answer(order.answer, answer)


def read_layout(text: str) -> tuple[Spec, ...]:
    """Read a layout. Raises what a text in another form makes."""
    return tuple((str(n), getattr(torch, dtype), tuple(shape), int(at)) for n, dtype, shape, at in json.loads(text))


def views_of(specs: Sequence[Spec], bucket: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors in a bucket's bytes, without a copy. Raises ValueError if one is not inside."""
    views = []
    for name, dtype, shape, offset in specs:
        nbytes = math.prod(shape) * dtype.itemsize
        if offset % dtype.itemsize or not 0 <= offset <= offset + nbytes <= bucket.nbytes:
            raise ValueError(f"{name} can't be at offset {offset} of a bucket of {bucket.nbytes} bytes")
        views.append((name, bucket[offset : offset + nbytes].view(dtype).view(shape)))
    return views


def write_answer(path: str, answer: Mapping[str, object]) -> None:
    """Write an answer to a file that the sender has made. Does nothing if there is none, as on another host."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.warning("the answer can't be written to %s: %s", path, error.strerror)
        return
    with os.fdopen(descriptor, "wb") as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.write(json.dumps(answer).encode())
