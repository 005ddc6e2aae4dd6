"""Compares what the layers hold with samples of the trainer's weights. See `millrace_audit`."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from millrace_audit import Place, Sample, audited, read_samples

from .dry_run import Description, Sent, described
from .held import addresses_of
from .recording import Memory


@dataclass(slots=True)
class Known:
    """Where a model keeps the tensors that were sampled, found when its parameters had these addresses. shapes: of the
    parameters, as a checkpoint fills them."""

    sent: tuple[Sent, ...]
    addresses: Mapping[str, int]
    description: Description
    shapes: Mapping[str, tuple[int, ...]]


OF_MODELS: "weakref.WeakKeyDictionary[torch.nn.Module, Known]" = weakref.WeakKeyDictionary()


def audit(model: torch.nn.Module, text: str) -> Mapping[str, object]:
    """Return what the layers hold. text: the samples as JSON. Raises what a text in another form makes."""
    samples = read_samples(text)
    known = known_of(model, [(sample.name, sample.dtype, sample.shape) for sample in samples])
    if isinstance(known, str):
        return {"unplanned": known}
    answer: Mapping[str, object] = audited(samples, partial(places, known), dict(model.named_modules()))
    return answer


def known_of(model: torch.nn.Module, sent: Sequence[Sent]) -> Known | str:
    """Return where the model keeps these tensors, or why that can't be said."""
    addresses = addresses_of(model.named_parameters())
    known = OF_MODELS.get(model)
    if known is not None and known.sent == tuple(sent) and known.addresses == addresses:
        return known
    with as_a_checkpoint_fills(model) as (load, parameters):
        description = described(load, Memory(parameters.items()), sent)
        if isinstance(description, str):
            return description
        shapes = {name: tuple(one.shape) for name, one in parameters.items()}
    known = OF_MODELS[model] = Known(tuple(sent), addresses, description, shapes)
    return known


@contextmanager
def as_a_checkpoint_fills(model: Any) -> Iterator[tuple[Any, Mapping[str, torch.Tensor]]]:
    """Yield the model's own `load_weights`, and its parameters in the form in which a checkpoint fills them.

    With the load format `flash_rl`, SGLang has replaced both: the parameters by quantised ones, and the loader by one
    that quantises. It has recorded how they were. While the block runs, the model has stand-ins for such parameters,
    whose memory is never touched.
    """
    parameters = dict(model.named_parameters())
    before = getattr(model, "original_weights_rebuild_keys", None)
    if before is None:
        yield model.load_weights, parameters
        return
    changed = {name: one for name, one in parameters.items() if name in before and one.dtype != before[name]["dtype"]}
    loaders: Mapping[str, Mapping[str, Any]] = model.recorded_loader
    try:
        for name in changed:
            stand_in = torch.nn.Parameter(torch.empty(before[name]["shape"], dtype=before[name]["dtype"]), False)
            for attribute, by_name in loaders.items():
                if name in by_name:
                    value = by_name[name]
                    bound = callable(value) and not hasattr(value, "__self__")
                    setattr(stand_in, attribute, value.__get__(stand_in) if bound else value)
            place(model, name, stand_in)
        yield partial(type(model).load_weights, model), dict(model.named_parameters())
    finally:
        for name, one in changed.items():
            place(model, name, one)


def place(model: torch.nn.Module, name: str, parameter: torch.Tensor) -> None:
    """Make a tensor the parameter of this name."""
    path, _, own = name.rpartition(".")
    model.get_submodule(path)._parameters[own] = parameter  # type: ignore[assignment]


def places(known: Known, sample: Sample) -> list[Place]:
    """Return where the model keeps a sent tensor; nothing if this rank does not have it."""
    found = []
    for need in known.description.needs.get(sample.name, ()):
        module, _, name = need.parameter.rpartition(".")
        shape = known.shapes[need.parameter]
        if len(shape) >= 2:
            offset, strides = int(need.target.storage_offset()), tuple(need.target.stride())
            found.append(Place(module, name, need.box, need.along, offset, strides, shape))
    return found
