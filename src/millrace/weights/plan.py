"""The distribution of tensors over buckets. Pure functions."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from millrace.buckets import TensorSpec

# Every tensor starts on a cache line, which also satisfies every dtype.
ALIGNMENT = 64


class HasSize(Protocol):
    @property
    def nbytes(self) -> int: ...


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
