"""A transport that changes bytes after their checksums were taken and before the engines read them."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from millrace.buckets import Bucket, DiskBucket, ProcessGroupBucket, SharedMemoryBucket, TensorSpec, TorchStorageBucket
from millrace.errors import EngineError
from millrace.model_folder import stored_tensors
from millrace.weights.step import StepResult
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.process_group import BroadcastBucket

SIGN = 0x80  # the sign bit, in the last byte of a little-endian float


@dataclass(frozen=True, slots=True)
class Corruption:
    """One corruption, of the next bucket that allows it.

    With an `engine`, only that engine reads other bytes: two tensors of the same shape are swapped. With None, all
    engines do: one number changes its sign, or with `whole` all numbers of a tensor."""

    engine: str | None
    whole: bool = False


class CorruptingTransport(Transport):
    """Wraps the real transport `inner`. `corruption` is the corruption that is still to be made."""

    def __init__(self, inner: Transport, scratch: Path) -> None:
        self._inner, self._scratch = inner, scratch
        self.corruption: Corruption | None = None
        self._specs: Sequence[TensorSpec] = ()  # of the last bucket
        self._copied = False  # whether the last bucket is a corrupted copy

    @property
    def done(self) -> bool:
        return self.corruption is None

    async def open(
        self, targets: Sequence[PublishTarget], version: int, *, deadline: float
    ) -> Mapping[str, EngineError]:
        return await self._inner.open(targets, version, deadline=deadline)

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        for staged in self._inner.staged(self._placed(buckets)):
            yield self._corrupted(staged)

    def _placed(self, buckets: Iterator[NamedTensors]) -> Iterator[NamedTensors]:
        for tensors in buckets:
            self._specs, self._copied = layout_of(tensors).specs, False
            yield tensors

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        # A corrupted bucket is a copy, which only `load` sends.
        return {} if self._copied else await self._inner.deliver(targets, deadline=deadline)

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        return await self._inner.load(targets, staged, deadline=deadline)

    async def close(self) -> None:
        await self._inner.close()

    def _corrupted(self, staged: StagedBucket) -> StagedBucket:
        """Returns the corrupted bucket. Every engine gets its bucket before the first one reads its bytes."""
        if self.corruption is not None and self.corruption.engine is None and isinstance(staged, BroadcastBucket):
            whole = staged.number is not None
            tensors = corrupted_broadcast(staged, self._specs if whole else None, self.corruption)
            if tensors is not None:
                self.corruption, self._copied = None, True
                return replace(staged, tensors=tensors)

        def bucket_for(target: PublishTarget) -> Bucket:
            bucket, corruption = staged.bucket_for(target), self.corruption
            if corruption is None or corruption.engine not in (None, target.engine.name):
                return bucket
            changed = corrupt_bucket(bucket, corruption) if corruption.engine is None else self._for_one(bucket)
            if changed is not None:
                self.corruption = None
            return changed or bucket

        return replace(staged, bucket_for=bucket_for)

    def _for_one(self, bucket: Bucket) -> Bucket | None:
        """Swaps two tensors of one shape. Returns None if the bucket has no such two."""
        if isinstance(bucket, DiskBucket):
            copy = self._scratch / "misread"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(bucket.path, copy)
            corrupt_folder(copy, Corruption(None, whole=True))
            return DiskBucket(str(copy))
        assert isinstance(bucket, SharedMemoryBucket | TorchStorageBucket | ProcessGroupBucket)
        specs = list(bucket.tensors)
        for (i, one), (j, other) in combinations(enumerate(specs), 2):
            if one.shape == other.shape and len(one.shape) == 2:
                specs[i], specs[j] = replace(one, name=other.name), replace(other, name=one.name)
                return replace(bucket, tensors=tuple(specs))
        return None


def corrupt_bucket(bucket: Bucket, corruption: Corruption) -> Bucket | None:
    """Changes the memory or the files that the bucket names. Returns None if the bucket holds no inner weight."""
    if isinstance(bucket, DiskBucket):
        corrupt_folder(Path(bucket.path), corruption)
        return bucket
    if isinstance(bucket, ProcessGroupBucket):
        return None  # it names no memory
    assert isinstance(bucket, SharedMemoryBucket | TorchStorageBucket)
    spec = first_inner_weight(bucket.tensors)
    if spec is None:
        return None
    path = bucket.path if isinstance(bucket, SharedMemoryBucket) else f"/dev/shm/{bucket.handle.decode().lstrip('/')}"
    corrupt_file(Path(path), spec.offset, spec.offset + spec.nbytes, corruption)
    return bucket


def corrupted_broadcast(
    staged: BroadcastBucket, specs: Sequence[TensorSpec] | None, corruption: Corruption
) -> tuple[torch.Tensor, ...] | None:
    """Returns what to broadcast, with one tensor corrupted. specs: of the tensors in the bucket, if it is broadcast as
    a whole. The originals may be the trainer's own, so they stay as they are."""
    sent = list(staged.tensors)
    if specs is not None:
        sent = [sent[0].clone()]
        spec = first_inner_weight(specs)
        if spec is None:
            return None
        place = sent[0][spec.offset : spec.offset + spec.nbytes].view(torch.float32)
    else:
        chosen = next(
            (index for index, name in enumerate(staged.names) if is_inner_weight(name, sent[index].dim())), -1
        )
        if chosen < 0:
            return None
        sent[chosen] = sent[chosen].clone()
        place = sent[chosen].reshape(-1)
    place[: None if corruption.whole else 1].neg_()
    return tuple(sent)


def corrupt_folder(folder: Path, corruption: Corruption) -> None:
    tensor = next(one for name, one in stored_tensors(folder).items() if is_inner_weight(name, len(one.shape)))
    corrupt_file(tensor.file, tensor.begin, tensor.end, corruption)


def corrupt_file(path: Path, begin: int, end: int, corruption: Corruption) -> None:
    """Flips the sign of the first number, or of all numbers."""
    with path.open("r+b") as file:
        file.seek(begin)
        data = bytearray(file.read(end - begin))
        for index in range(3, len(data) if corruption.whole else 4, 4):
            data[index] ^= SIGN
        file.seek(begin)
        file.write(data)


def first_inner_weight(specs: Sequence[TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in specs if is_inner_weight(spec.name, len(spec.shape))), None)


def is_inner_weight(name: str, dimensions: int) -> bool:
    """Whether a change of this tensor changes the output. The norms hide changes of tied and of small tensors."""
    return ".layers." in name and dimensions == 2
