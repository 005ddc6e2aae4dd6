"""Which tensors travel together. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from millrace.types import TensorSpec

# Every tensor starts on a cache line, which also satisfies every dtype.
ALIGNMENT = 64


class HasSize(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=HasSize)


def buckets(tensors: Iterable[tuple[str, T]], bucket_bytes: int) -> Iterator[list[tuple[str, T]]]:
    """Groups named tensors, in their order, into buckets of at most `bucket_bytes`; a larger tensor gets one of its
    own.

    Takes the next tensor only when it is about to be placed, so a source that gathers them one by one stays lazy.
    """
    bucket: list[tuple[str, T]] = []
    size = 0
    for name, tensor in tensors:
        needed = padded(tensor.nbytes)
        if bucket and size + needed > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += needed
    if bucket:
        yield bucket


def layout(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[TensorSpec, ...]:
    """Places (name, dtype, shape, nbytes) side by side in one bucket."""
    specs = []
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        specs.append(TensorSpec(name, dtype, shape, offset, nbytes))
        offset += padded(nbytes)
    return tuple(specs)


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
