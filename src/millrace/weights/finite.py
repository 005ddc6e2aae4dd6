"""Refuse weights with NaN or infinite values: engines accept them, and then generate nonsense or die."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from millrace.errors import PublishError
from millrace.weights.cast import Dtypes
from millrace.weights.source import NamedTensor, WeightSource


def only_finite(source: WeightSource, dtypes: Dtypes) -> WeightSource:
    """Check that every tensor is finite, also after its cast to the engines' `dtypes`, and return the source. Blocks.

    If the tensors can be iterated only once, each is checked when it is taken from the returned source.

    Raises:
        PublishError: a tensor has a NaN or an infinite value.
    """
    if source.once:
        return source.converted(lambda tensors: _checked_one_by_one(tensors, dtypes))
    find = source.not_finite
    _require(find(dtypes) if find is not None else not_finite(source, dtypes), dtypes)
    return source


def not_finite(tensors: Iterable[NamedTensor], dtypes: Dtypes) -> list[str]:
    """Return the names of the tensors that have a NaN or an infinite value. Iterates a second time only if it suspects
    one. All sums are queued before the first is read, so that a GPU computes them without a pause."""
    sums: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        sums.setdefault(tensor.device, []).append((name, _sum(_as_sent(name, tensor, dtypes))))
    suspects = {name for of_device in sums.values() for name in _infinite(of_device)}
    if not suspects:
        return []
    return [name for name, tensor in tensors if name in suspects and not _is_finite(_as_sent(name, tensor, dtypes))]


def _infinite(sums: Sequence[NamedTensor]) -> Iterator[str]:
    """Yield the names of the scalars that are not finite. They are on one device, which is waited for once."""
    totals = torch.stack([total for _, total in sums]).tolist()
    return (name for (name, _), total in zip(sums, totals, strict=True) if not math.isfinite(total))


def _as_sent(name: str, tensor: torch.Tensor, dtypes: Dtypes) -> torch.Tensor:
    """Return the tensor, cast only if its dtype in the engines is float16, which has the smallest range."""
    dtype = dtypes.cast_to(name, tensor.dtype)
    return tensor.detach().to(dtype) if dtype == torch.float16 else tensor.detach()


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 scalar that is not finite if any value is not. Large finite values may overflow it too."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).sum(dtype=torch.float32)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _checked_one_by_one(tensors: Iterator[NamedTensor], dtypes: Dtypes) -> Iterator[NamedTensor]:
    for name, tensor in tensors:
        _require(not_finite([(name, tensor)], dtypes), dtypes)
        yield name, tensor


def _require(bad: list[str], dtypes: Dtypes) -> None:
    if not bad:
        return
    more = len(bad) - 1
    subject = f"{bad[0]} and {more} more tensor{'s' if more > 1 else ''} have" if more else f"{bad[0]} has"
    in_dtype = " in float16" if dtypes.usual == "float16" else ""
    raise PublishError(
        f"{subject} NaN or infinite values{in_dtype}, so the version was not published "
        "(require_finite=False publishes it anyway)"
    )
