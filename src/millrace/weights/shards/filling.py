"""How one rank of a trainer fills its memory of one round, planned once for shards that stay where they are."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from millrace.extension.millrace_boxes import label, shape_of
from millrace.extension.millrace_samples import SampledPlaces
from millrace.weights.packing import Packing, Place
from millrace.weights.shards.schedule import Piece, Schedule
from millrace.weights.shards.views import local_piece

Prepared = TypeVar("Prepared")


class Copies:
    """Copies of pieces of a rank's shards into memory of one round. pieces: with their offsets."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        pieces: Sequence[tuple[Piece, int]],
        shards: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._schedule, self._rank, self._pieces = schedule, rank, pieces
        sources = (self._local(shards, piece) for piece, _ in pieces)
        self._packing = Packing(sources, [place_of(schedule, *placed) for placed in pieces], device)

    def run(self, shards: Sequence[Tensor], memory: Tensor) -> None:
        """Make them. memory: [nbytes] uint8."""
        self._packing.run(memory, lambda index: self._local(shards, self._pieces[index][0]))

    def _local(self, shards: Sequence[Tensor], piece: Piece) -> Tensor:
        view = self._schedule.views[piece.tensor]
        owned = self._schedule.owners[self._rank][view.source]
        assert owned is not None
        return local_piece(shards[view.source], owned, view, piece.box)


class Filling:
    """A rank's copies of one round.

    received, sent: the bytes from and to each rank. exchanged: those of the parts that other ranks send, without
    padding. shards: this rank's, in the order of the trainer's tensors. device: theirs, and that of the buckets.
    """

    def __init__(
        self, schedule: Schedule, number: int, rank: int, shards: Sequence[Tensor], device: torch.device
    ) -> None:
        one, ranks = schedule.rounds[number], schedule.ranks
        self.received, self.sent = one.received(rank, ranks), one.sent(rank, ranks)
        bucket = list(one.bucket(rank, ranks))
        self.exchanged = sum(piece.nbytes for piece, _ in bucket if piece.sender != rank)
        own = [(piece, offset) for piece, offset in bucket if piece.sender == rank]
        self._own = Copies(schedule, rank, own, shards, device)
        self._outgoing = Copies(schedule, rank, list(one.outgoing(rank, ranks)), shards, device)
        self._samples = samples_of(schedule, bucket, device)

    def pack(self, shards: Sequence[Tensor], outgoing: Tensor) -> None:
        """Copy what other ranks get into `outgoing`, [nbytes] uint8."""
        self._outgoing.run(shards, outgoing)

    def copy_own(self, shards: Sequence[Tensor], bucket: Tensor) -> None:
        """Copy what this rank has itself into its bucket, [nbytes] uint8."""
        self._own.run(shards, bucket)

    def checksums(self, bucket: Tensor) -> str:
        """Return the sampled checksums of the parts in a bucket, in the order of `labels`, one after the other."""
        return self._samples.checksums(bucket)


def prepared(schedule: Schedule, number: int, shards: Sequence[Tensor], make: Callable[[], Prepared]) -> Prepared:
    """Return what `make` returns for this rank and a round. It is kept for the next version, if the shards are where
    they were."""
    where = [(tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in shards]
    found, made = schedule.prepared.get(number, (None, None))
    if found != where:
        made = make()
        schedule.prepared[number] = where, made
    return cast(Prepared, made)


def place_of(schedule: Schedule, piece: Piece, offset: int) -> Place:
    return Place(offset, getattr(torch, schedule.views[piece.tensor].dtype), shape_of(piece.box))


def samples_of(schedule: Schedule, pieces: Sequence[tuple[Piece, int]], device: torch.device) -> SampledPlaces:
    """Return what makes the sampled checksums of pieces in memory, one after the other."""
    sizes = [schedule.views[piece.tensor].itemsize for piece, _ in pieces]
    return SampledPlaces(
        [(size, piece.nbytes // size, offset) for size, (piece, offset) in zip(sizes, pieces, strict=True)], device
    )


def labels(schedule: Schedule, pieces: Iterable[tuple[Piece, int]]) -> list[str]:
    """Return the labels of pieces, in their order."""
    return [label(schedule.views[piece.tensor].name, piece.box) for piece, _ in pieces]
