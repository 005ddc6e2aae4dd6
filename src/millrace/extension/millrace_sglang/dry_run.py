"""Finds out which parts of an update's tensors this rank copies, and where to, without copying anything.

The model's own `load_weights` runs on tensors of the meta device, which have a shape and no content. Each copy of such
a tensor into a parameter is noted and left out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from millrace_boxes import Box, box_of, disjoint
from millrace_changes import Need
from millrace_words import first_line
from torch.utils._python_dispatch import TorchDispatchMode

from .recording import COPY, FILLS, Fill, Memory, tensors_in

TO = torch.ops.aten._to_copy.default
Sent = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor of the update: name, dtype, shape


@dataclass(slots=True)
class Description:
    """What this rank copies of an update's tensors, by the tensor's name, and what it sets to constants."""

    needs: dict[str, list[Need]] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)

    def fill(self) -> Counter[str]:
        """Set the constants, which a parameter does not have if its memory was released. Return how many elements of
        each parameter they are."""
        filled: Counter[str] = Counter()
        with torch.no_grad():
            for one in self.fills:
                one.target.fill_(one.value)
                filled[one.parameter] += one.target.numel()
        return filled

    def boxes(self, name: str) -> list[Box]:
        """Return the boxes of a tensor that this rank needs, which do not overlap. Empty if it needs none of it."""
        boxes: list[Box] = disjoint(need.box for need in self.needs.get(name, ()))
        return boxes


class NotPlainError(Exception):
    """The loader does something else than copying boxes into parameters."""


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in `description` what a loader does with tensors of the meta device. Parameters are not changed.

    Raises NotPlainError as soon as the loader does more than copy.
    """

    def __init__(self, memory: Memory, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._sources = {storage_of(tensor): (name, tensor) for name, tensor in sources.items()}
        self.description = Description()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is TO and args[0].is_meta and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0].detach()  # to another device: there is nothing to move
        owner = next((owner for one in tensors_in(args) if (owner := self._memory.owner(one)) is not None), None)
        if owner is None:
            return func(*args, **kwargs)
        if func is COPY and self._memory.owner(args[0]) is not None:
            self._note(owner, args[0], args[1])
            return args[0]
        if func in FILLS:
            self.description.fills.append(Fill(owner, args[0].detach(), args[1] if len(args) > 1 else 0))
            return args[0]
        if func._schema.is_mutable:
            raise NotPlainError(f"{func} of {owner}")
        result = func(*args, **kwargs)
        if any(one.numel() and self._memory.owner(one) is None for one in tensors_in((result,))):
            raise NotPlainError(f"{func} of {owner}")
        return result

    def _note(self, owner: str, target: torch.Tensor, source: torch.Tensor) -> None:
        if not source.is_meta or storage_of(source) not in self._sources:
            raise NotPlainError(f"a copy into {owner} of something that was computed")
        name, sent = self._sources[storage_of(source)]
        found = box_of(sent.shape, int(source.storage_offset()), source.shape, source.stride())
        if source.shape != target.shape or found is None:
            raise NotPlainError(f"a copy into {owner} that is no rectangular part of {name}")
        self.description.needs.setdefault(name, []).append(Need(owner, target.detach(), *found))


def described(load: Any, memory: Memory, sent: Sequence[Sent]) -> Description | str:
    """Return what this rank would copy of an update's tensors, or why that can't be said. Loads nothing.

    load: the model's own `load_weights`. memory: of its parameters.
    """
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in sent}
    dry = DryRun(memory, sources)
    try:
        with torch.no_grad(), dry:
            load(list(sources.items()))
    except NotPlainError as error:
        return f"its loader does more than copy: {error}"
    except Exception as error:
        return f"its loader can't be tried without content: {type(error).__name__}: {first_line(error)}"
    return dry.description


def storage_of(tensor: torch.Tensor) -> int:
    """Return a number that tensors have in common if they are views of the same memory."""
    return int(tensor.untyped_storage()._cdata)
