"""Whether weights are numbers: an engine takes what is not without a word, and generates nonsense or fails."""

import math
from collections.abc import Iterable, Iterator

import torch

from millrace.errors import PublishError

NamedTensor = tuple[str, torch.Tensor]


def only_finite(tensors: Iterable[NamedTensor]) -> Iterable[NamedTensor]:
    """The tensors, none of which has a NaN or an infinite value. Raises PublishError otherwise: at once, or of an
    iterator, which can be gone through only once, when the tensor comes. Blocks."""
    if isinstance(tensors, Iterator):
        return _as_they_come(tensors)
    # Sums first, which are cheap: all are begun before the first is waited for, since a GPU's are late. One that is not
    # finite may only have grown too large.
    sums = [(name, _sum(tensor)) for name, tensor in tensors]
    if suspects := {name for name, total in sums if not math.isfinite(total)}:
        _require([name for name, tensor in tensors if name in suspects and not _finite(tensor)])
    return tensors


def _as_they_come(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
    for name, tensor in tensors:
        _require([] if math.isfinite(_sum(tensor)) or _finite(tensor) else [name])
        yield name, tensor


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Not finite if anything in it is not."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().sum(dtype=torch.float32)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _require(bad: list[str]) -> None:
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise PublishError(f"{bad[0]}{more} has NaN or infinite values, which publish.require_finite forbids")
