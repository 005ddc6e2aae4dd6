"""A transport in whose hands bytes change after their checksums were taken, before the engines read them."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from millrace.errors import EngineError
from millrace.model_folder import stored_tensors
from millrace.types import Bucket, DiskBucket, ProcessGroupBucket, SharedMemoryBucket, TensorSpec, TorchStorageBucket
from millrace.weights.step import StepResult
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport
from millrace.weights.transports.process_group import BroadcastBucket

SIGN = 0x80  # in the last byte of a little-endian float


@dataclass(frozen=True, slots=True)
class Damage:
    """Once, to the next bucket in which it is possible. `engine`: only what this one reads, where two tensors of one
    shape are exchanged; None: the bytes that all read, of one number or of a `whole` tensor."""

    engine: str | None
    whole: bool = False


class MeddlingTransport(Transport):
    """The real transport `inner`, and what happens to it. `damage` is what is still to come."""

    def __init__(self, inner: Transport, scratch: Path) -> None:
        self._inner, self._scratch = inner, scratch
        self.damage: Damage | None = None

    @property
    def done(self) -> bool:
        return self.damage is None

    async def open(
        self, targets: Sequence[PublishTarget], version: int, *, deadline: float
    ) -> Mapping[str, EngineError]:
        return await self._inner.open(targets, version, deadline=deadline)

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        for staged in self._inner.staged(buckets):
            yield self._meddled(staged)

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        return await self._inner.load(targets, staged, deadline=deadline)

    async def close(self) -> None:
        await self._inner.close()

    def _meddled(self, staged: StagedBucket) -> StagedBucket:
        """All engines are handed a bucket before the first of them asks for its bytes."""
        if self.damage is not None and self.damage.engine is None and isinstance(staged, BroadcastBucket):
            tensors = spoiled(staged, self.damage)
            if tensors is not None:
                self.damage = None
                return replace(staged, tensors=tensors)

        def bucket_for(target: PublishTarget) -> Bucket:
            bucket, damage = staged.bucket_for(target), self.damage
            if damage is None or damage.engine not in (None, target.engine.name):
                return bucket
            changed = spoil(bucket, damage) if damage.engine is None else self._for_one(bucket)
            if changed is not None:
                self.damage = None
            return changed or bucket

        return replace(staged, bucket_for=bucket_for)

    def _for_one(self, bucket: Bucket) -> Bucket | None:
        """None: nothing of it can be exchanged."""
        if isinstance(bucket, DiskBucket):
            copy = self._scratch / "misread"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(bucket.path, copy)
            spoil_folder(copy, Damage(None, whole=True))
            return DiskBucket(str(copy))
        assert isinstance(bucket, SharedMemoryBucket | TorchStorageBucket | ProcessGroupBucket)
        specs = list(bucket.tensors)
        for (i, one), (j, other) in combinations(enumerate(specs), 2):
            if one.shape == other.shape and len(one.shape) == 2:
                specs[i], specs[j] = replace(one, name=other.name), replace(other, name=one.name)
                return replace(bucket, tensors=tuple(specs))
        return None


def spoil(bucket: Bucket, damage: Damage) -> Bucket | None:
    """Changes the memory or the files that the bucket names. None: nothing in it is worth it."""
    if isinstance(bucket, DiskBucket):
        spoil_folder(Path(bucket.path), damage)
        return bucket
    if isinstance(bucket, ProcessGroupBucket):
        return None  # no memory is named
    assert isinstance(bucket, SharedMemoryBucket | TorchStorageBucket)
    spec = inner(bucket.tensors)
    if spec is None:
        return None
    path = bucket.path if isinstance(bucket, SharedMemoryBucket) else f"/dev/shm/{bucket.handle.decode().lstrip('/')}"
    spoil_file(Path(path), spec.offset, spec.offset + spec.nbytes, damage)
    return bucket


def spoiled(staged: BroadcastBucket, damage: Damage) -> tuple[torch.Tensor, ...] | None:
    """The tensors to broadcast, of which one is a copy with other bytes: they may be the trainer's own."""
    chosen = next(
        (index for index, name in enumerate(staged.names) if matters(name, staged.tensors[index].dim())), None
    )
    if chosen is None:
        return None
    copy = staged.tensors[chosen].clone()
    copy.reshape(-1)[: None if damage.whole else 1].neg_()
    return (*staged.tensors[:chosen], copy, *staged.tensors[chosen + 1 :])


def spoil_folder(folder: Path, damage: Damage) -> None:
    tensor = next(one for name, one in stored_tensors(folder).items() if matters(name, len(one.shape)))
    spoil_file(tensor.file, tensor.begin, tensor.end, damage)


def spoil_file(path: Path, begin: int, end: int, damage: Damage) -> None:
    """Turns the sign of the first number, or of all."""
    with path.open("r+b") as file:
        file.seek(begin)
        data = bytearray(file.read(end - begin))
        for index in range(3, len(data) if damage.whole else 4, 4):
            data[index] ^= SIGN
        file.seek(begin)
        file.write(data)


def inner(specs: Sequence[TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in specs if matters(spec.name, len(spec.shape))), None)


def matters(name: str, dimensions: int) -> bool:
    """Whether other tokens come of it: the norms hide a change of what is tied or small."""
    return ".layers." in name and dimensions == 2
