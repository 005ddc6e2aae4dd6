"""Records what a model's `load_weights` does with the tensors of a bucket."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

COPY = torch.ops.aten.copy_.default
FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class Memory:
    """Finds the parameter to which an address belongs."""

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        found = [(tensor.data_ptr(), tensor.nbytes, name) for name, tensor in parameters if tensor.nbytes]
        self._ranges = sorted(found)
        self._starts = [start for start, _, _ in self._ranges]

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the parameter in whose memory a tensor lies."""
        if tensor.is_meta or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start, nbytes, name = self._ranges[index]
        return name if address < start + nbytes else None


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy from the bucket into a parameter. offset: of the source in the bucket, in bytes."""

    parameter: str
    target: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Fill:
    """A constant that is written into elements of a parameter, such as the padding of an embedding."""

    parameter: str
    target: torch.Tensor
    value: Any


@dataclass(slots=True)
class Recording:
    """What was recorded.

    copies: from the bucket into parameters, in order. fills: constants, none of them over an earlier copy. other: what
    else happened to parameters; None if nothing.
    """

    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    other: str | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records into `recording` while it is active. The operations are executed as usual."""

    def __init__(self, memory: Memory, bucket: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._start, self._end = bucket.data_ptr(), bucket.data_ptr() + bucket.nbytes
        self.recording = Recording()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        owners = [owner for one in tensors_in(args) if (owner := self._memory.owner(one)) is not None]
        if owners and self.recording.other is None:
            self._note(func, args, result, owners[0])
        return result

    def _note(self, func: Any, args: tuple[Any, ...], result: Any, owner: str) -> None:
        """Note an operation that has memory of a parameter among its arguments."""
        if func is COPY and self._memory.owner(args[0]) is not None:
            self._note_copy(args[0], args[1])
        elif func in FILLS:
            self._note_fill(owner, args[0], args[1] if len(args) > 1 else 0)
        elif func._schema.is_mutable or not self._is_view(result):
            self.recording.other = f"{func} of {owner}"

    def _is_view(self, result: Any) -> bool:
        """Return whether an operation has only made views of parameters."""
        return all(self._memory.owner(one) is not None for one in tensors_in((result,)) if one.numel())

    def _note_fill(self, owner: str, target: torch.Tensor, value: Any) -> None:
        first, end = span(target)
        for copy in self.recording.copies:
            start, stop = span(copy.target)
            if first < stop and start < end:  # the plan writes constants first
                self.recording.other = f"a constant over a copy into {owner}"
                return
        self.recording.fills.append(Fill(owner, target.detach(), value))

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        owner = self._memory.owner(target)
        assert owner is not None
        inside = source.numel() and self._start <= source.data_ptr() < self._end
        if not inside or source.shape != target.shape:
            self.recording.other = f"a copy into {owner} that is not from the bucket"
            return
        offset = source.data_ptr() - self._start
        made = Copy(owner, target.detach(), offset, tuple(source.shape), source.stride(), source.dtype)
        self.recording.copies.append(made)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the end of its last one."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def tensors_in(values: Sequence[Any]) -> Iterable[torch.Tensor]:
    """Yield the tensors among the arguments of an operation."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
