"""How one rank of a trainer fills its bucket of one round, planned once for shards that stay where they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.extension.millrace_boxes import label, shape_of
from millrace.extension.millrace_samples import SampledPlaces
from millrace.weights.packing import Packing, Place
from millrace.weights.shards.schedule import Piece, Schedule
from millrace.weights.shards.views import local_piece


class Filling:
    """A rank's copies of one round.

    received, sent: the bytes from and to each rank. exchanged: those of the parts that other ranks send, without
    padding. shards: this rank's, in the order of the trainer's tensors. device: theirs, and that of the buckets.
    """

    def __init__(
        self, schedule: Schedule, number: int, rank: int, shards: Sequence[Tensor], device: torch.device
    ) -> None:
        one, ranks = schedule.rounds[number], schedule.ranks
        self._schedule, self._rank = schedule, rank
        self.received, self.sent = one.received(rank, ranks), one.sent(rank, ranks)
        bucket = list(one.bucket(rank, ranks))
        self.exchanged = sum(piece.nbytes for piece, _ in bucket if piece.sender != rank)
        self._own = [(piece, offset) for piece, offset in bucket if piece.sender == rank]
        self._outgoing = list(one.outgoing(rank, ranks))
        self._own_packing, self._outgoing_packing = (
            Packing(
                (self._local(shards, piece) for piece, _ in pieces),
                [self._place(piece, offset) for piece, offset in pieces],
                device,
            )
            for pieces in (self._own, self._outgoing)
        )
        places = [self._place(piece, offset) for piece, offset in bucket]
        sizes = [
            (place.dtype.itemsize, piece.nbytes // place.dtype.itemsize, place.offset)
            for place, (piece, _) in zip(places, bucket, strict=True)
        ]
        self._samples = SampledPlaces(sizes, device)

    def pack(self, shards: Sequence[Tensor], outgoing: Tensor) -> None:
        """Copy what other ranks get into `outgoing`, [nbytes] uint8."""
        self._outgoing_packing.run(outgoing, lambda index: self._local(shards, self._outgoing[index][0]))

    def copy_own(self, shards: Sequence[Tensor], bucket: Tensor) -> None:
        """Copy what this rank has itself into its bucket, [nbytes] uint8."""
        self._own_packing.run(bucket, lambda index: self._local(shards, self._own[index][0]))

    def checksums(self, bucket: Tensor) -> str:
        """Return the sampled checksums of the parts in a bucket, in the order of `labels`, one after the other."""
        return self._samples.checksums(bucket)

    def _place(self, piece: Piece, offset: int) -> Place:
        return Place(offset, getattr(torch, self._schedule.views[piece.tensor].dtype), shape_of(piece.box))

    def _local(self, shards: Sequence[Tensor], piece: Piece) -> Tensor:
        view = self._schedule.views[piece.tensor]
        owned = self._schedule.owners[self._rank][view.source]
        assert owned is not None
        return local_piece(shards[view.source], owned, view, piece.box)


def labels(schedule: Schedule, number: int, rank: int) -> list[str]:
    """Return the labels of the parts in the bucket of `rank`, in their order."""
    pieces = schedule.rounds[number].bucket(rank, schedule.ranks)
    return [label(schedule.views[piece.tensor].name, piece.box) for piece, _ in pieces]
