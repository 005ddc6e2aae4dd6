"""The names and shapes of the tensors to publish, and their distribution over buckets. Pure functions."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from millrace.errors import PublishError
from millrace.types import TensorSpec

if TYPE_CHECKING:
    import torch

# Every tensor starts on a cache line, which also satisfies every dtype.
ALIGNMENT = 64


class HasSize(Protocol):
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Announcing(Protocol):
    """Tensors whose names and shapes are known before any of them is computed or gathered."""

    def shapes(self) -> Iterable[tuple[str, tuple[int, ...]]]: ...


T = TypeVar("T", bound=HasSize)

# SGLang's fp8 loader fuses the scales of q, k and v, and stores them correctly only if all three are in one load.
FUSED = re.compile(r"(.*\.)[qkv]_proj\.")


def buckets(tensors: Iterable[tuple[str, T]], bucket_bytes: int) -> Iterator[list[tuple[str, T]]]:
    """Group named tensors, in their order, into buckets of at most `bucket_bytes`. A larger tensor gets its own bucket.
    The q, k and v of one attention layer count as one tensor if they are consecutive.

    Lazy: takes a tensor from `tensors` only to place it, so a source can gather its tensors one by one.
    """
    bucket: list[tuple[str, T]] = []
    size = 0
    for together in _inseparable(tensors):
        needed = sum(padded(tensor.nbytes) for _, tensor in together)
        if bucket and size + needed > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket += together
        size += needed
    if bucket:
        yield bucket


def _inseparable(tensors: Iterable[tuple[str, T]]) -> Iterator[list[tuple[str, T]]]:
    def attention(entry: tuple[str, T]) -> str | None:
        found = FUSED.match(entry[0])
        return found and found[1]

    for prefix, entries in itertools.groupby(tensors, attention):
        if prefix is None:
            yield from ([entry] for entry in entries)
        else:
            yield list(entries)


def layout(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[TensorSpec, ...]:
    """Return the place of each tensor, given as (name, dtype, shape, nbytes), in one bucket."""
    specs = []
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        specs.append(TensorSpec(name, dtype, shape, offset, nbytes))
        offset += padded(nbytes)
    return tuple(specs)


def padded(nbytes: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def announced(tensors: Iterable[tuple[str, "torch.Tensor"]]) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each tensor by its name; None if that is unknown until the tensors are computed. Raises
    PublishError if a name occurs twice."""
    if isinstance(tensors, Announcing):
        named = list(tensors.shapes())
    elif isinstance(tensors, Collection):
        named = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    else:
        return None
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise PublishError(f"the trainer named a tensor twice: {twice[0]}")
    return dict(named)
