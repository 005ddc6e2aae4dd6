"""Who sends which part of which tensor to whom, and in which bucket. Pure functions.

A trainer's rank fills buckets for the ranks of engines beside it: those on its GPU or, on the CPU, on its host. What it
does not have itself, another rank of the trainer sends it. To ranks of engines that are apart, the trainer's ranks send
everything. In a schedule these have the numbers behind the trainer's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import orjson

from millrace.errors import PublishError
from millrace.extension.millrace_boxes import Box, common, read_box, shape_of, without
from millrace.weights.plan import ALIGNMENT, padded

# Beside an engine, a rank holds two buckets and what it sends to other ranks for the next one. Together these are two
# buckets of the size that the caller has set. Apart from it, a rank holds what it sends for two rounds.
SHARE = 2 / 3


@dataclass(frozen=True, slots=True)
class ShardedView:
    """A tensor of the checkpoint as a box of a trainer's tensor.

    dtype: the engines', by torch's name. source: the index of the trainer's tensor. box: in the trainer's tensor.
    along: which dimension of the trainer's tensor each dimension goes along; None for one with a single element.
    """

    name: str
    dtype: str
    itemsize: int
    source: int
    box: Box
    along: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = shape_of(self.box)
        return tuple(1 if dim is None else sizes[dim] for dim in self.along)

    def to_source(self, box: Box) -> Box:
        """Return a box of this tensor as a box of the trainer's tensor."""
        found = list(self.box)
        for dim, piece in zip(self.along, box, strict=True):
            if dim is not None:
                first = self.box[dim][0]
                found[dim] = (first + piece[0], first + piece[1])
        return tuple(found)

    def from_source(self, box: Box) -> Box:
        """Return a box of the trainer's tensor, inside of this tensor, as a box of this tensor."""
        return tuple(
            (0, 1) if dim is None else (box[dim][0] - self.box[dim][0], box[dim][1] - self.box[dim][0])
            for dim in self.along
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that rank `sender` copies, or sends, into the bucket of rank `receiver`.

    tensor: the index of the ShardedView. box: in that tensor. nbytes: its size.
    """

    tensor: int
    box: Box
    sender: int
    receiver: int
    nbytes: int


@dataclass(frozen=True)
class Round:
    """One bucket of each rank.

    pieces: all of them, in the order in which they lie in buckets and in what is sent. names: the tensors of which no
    piece follows in a later round.
    """

    pieces: tuple[Piece, ...]
    names: tuple[str, ...]

    @cached_property
    def _sizes(self) -> dict[tuple[int, int], int]:
        """The bytes from each sender to each receiver, with the padding."""
        sizes: dict[tuple[int, int], int] = {}
        for piece in self.pieces:
            pair = piece.sender, piece.receiver
            sizes[pair] = sizes.get(pair, 0) + padded(piece.nbytes)
        return sizes

    def received(self, rank: int, ranks: int) -> list[int]:
        """Return how many bytes of the bucket of `rank` each other rank sends. They are at its beginning, in the order
        of the ranks. What the rank has itself follows them."""
        return [self._sizes.get((sender, rank), 0) if sender != rank else 0 for sender in range(ranks)]

    def sent(self, rank: int, ranks: int) -> list[int]:
        """Return how many bytes `rank` sends to each other rank."""
        return [self._sizes.get((rank, receiver), 0) if receiver != rank else 0 for receiver in range(ranks)]

    def bucket(self, rank: int, ranks: int) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces in the bucket of `rank`, and their offsets in it."""
        starts, at = list[int](), 0
        for size in self.received(rank, ranks):
            starts.append(at)
            at += size
        starts[rank] = at
        for piece in self.pieces:
            if piece.receiver == rank:
                yield piece, starts[piece.sender]
                starts[piece.sender] += padded(piece.nbytes)

    def outgoing(self, rank: int, ranks: int) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces that `rank` sends to other ranks, and their offsets in what it sends."""
        starts, at = list[int](), 0
        for size in self.sent(rank, ranks):
            starts.append(at)
            at += size
        for piece in self.pieces:
            if piece.sender == rank != piece.receiver:
                yield piece, starts[piece.receiver]
                starts[piece.receiver] += padded(piece.nbytes)

    def nbytes(self, rank: int) -> int:
        """Return the size of the bucket of `rank`."""
        return sum(size for (_, receiver), size in self._sizes.items() if receiver == rank)


@dataclass(frozen=True)
class Schedule:
    """How a version travels.

    views: the checkpoint's tensors. owners: for each of the trainer's ranks and tensors, the box that the rank has;
    None if it has nothing of it. ranks: how many there are, with those of engines apart.
    """

    views: tuple[ShardedView, ...]
    owners: tuple[tuple[Box | None, ...], ...]
    rounds: tuple[Round, ...]
    ranks: int

    @cached_property
    def prepared(self) -> dict[int, tuple[object, object]]:
        """What this rank has prepared for each round, and for which shards. Empty at first."""
        return {}

    def slot_bytes(self, rank: int) -> int:
        """Return the size of the largest bucket of `rank`."""
        return max(one.nbytes(rank) for one in self.rounds)

    def outgoing_bytes(self, rank: int) -> int:
        """Return the most bytes that `rank` sends in a round."""
        return max(sum(one.sent(rank, self.ranks)) for one in self.rounds)


def schedule(
    views: Sequence[ShardedView],
    owners: Sequence[Sequence[Box | None]],
    wants: Sequence[Sequence[Sequence[Box]]],
    bucket_bytes: int,
) -> Schedule:
    """Return how each rank gets the boxes that it wants: every element once, from itself if it has it.

    owners: for each of the trainer's ranks and tensors, the box that the rank has. wants: for each rank and view, boxes
    of the view that do not overlap; with more ranks than the trainer has, the trainer's own want nothing. What a rank
    holds besides its shards or parameters has at most twice `bucket_bytes`.

    Raises PublishError if no rank has an element, or a bucket has no room for one element.
    """
    share = 1 if len(wants) > len(owners) else SHARE
    limit = int(bucket_bytes * share) // ALIGNMENT * ALIGNMENT
    if limit == 0:
        raise PublishError(f"publish.bucket_bytes is {bucket_bytes}, and a bucket of parts needs at least 96")
    rounds: list[list[Piece]] = [[]]
    last = [0] * len(views)
    filled: dict[tuple[bool, int], int] = {}
    for index, view in enumerate(views):
        for receiver, of_rank in enumerate(wants):
            for box in of_rank[index]:
                for sender, part in _sources(view, box, owners, receiver):
                    for cut in _cut(part, limit // view.itemsize):
                        piece = Piece(index, cut, sender, receiver, math.prod(shape_of(cut)) * view.itemsize)
                        size, ends = padded(piece.nbytes), [(True, receiver)]
                        ends += [(False, sender)] * (sender != receiver)
                        if rounds[-1] and any(filled.get(end, 0) + size > limit for end in ends):
                            rounds.append([])
                            filled = {}
                        rounds[-1].append(piece)
                        filled |= {end: filled.get(end, 0) + size for end in ends}
        last[index] = len(rounds) - 1
    names: list[list[str]] = [[] for _ in rounds]
    for view, number in zip(views, last, strict=True):
        names[number].append(view.name)
    made = tuple(Round(tuple(pieces), tuple(of)) for pieces, of in zip(rounds, names, strict=True))
    return Schedule(tuple(views), tuple(map(tuple, owners)), made, len(wants))


def _sources(
    view: ShardedView, box: Box, owners: Sequence[Sequence[Box | None]], receiver: int
) -> Iterator[tuple[int, Box]]:
    """Yield from which rank each part of a box comes. The receiver is asked first, and then the ranks after it, so that
    ranks that want the same do not all ask one. A rank of an engine asks the trainer's ranks in turn."""
    left = [view.to_source(box)]
    for step in range(len(owners)):
        rank = (receiver + step) % len(owners)
        owned = owners[rank][view.source]
        if owned is None or not left:
            continue
        found = [both for piece in left if (both := common(piece, owned)) is not None]
        left = [rest for piece in left for rest in without(piece, owned)]
        yield from ((rank, view.from_source(part)) for part in found)
    if left:
        raise PublishError(f"no rank of the trainer has {view.name} from {view.from_source(left[0])}")


def _cut(box: Box, limit: int) -> Iterator[Box]:
    """Yield the box in slabs of at most `limit` elements."""
    sizes = shape_of(box)
    count = math.prod(sizes)
    if count <= limit:
        yield box
        return
    dim = next(dim for dim, size in enumerate(sizes) if size > 1)
    each = max(1, limit // (count // sizes[dim]))
    start, end = box[dim]
    for first in range(start, end, each):
        yield from _cut((*box[:dim], (first, min(first + each, end)), *box[dim + 1 :]), limit)


def written(
    views: Sequence[ShardedView],
    owners: Sequence[Sequence[Box | None]],
    wants: Sequence[Sequence[Sequence[Box]]],
    bucket_bytes: int,
) -> bytes:
    """Return the arguments of `schedule` as JSON, for the other ranks."""
    rows = [[v.name, v.dtype, v.itemsize, v.source, v.box, v.along] for v in views]
    return orjson.dumps([rows, owners, wants, bucket_bytes])


@lru_cache(maxsize=1)
def read_schedule(text: bytes) -> Schedule:
    """Return the schedule for what `written` made. Remembers the last one, because trainers publish again and again."""
    rows, owners, wants, bucket_bytes = orjson.loads(text)
    views = [
        ShardedView(name, dtype, itemsize, source, read_box(box), tuple(along))
        for name, dtype, itemsize, source, box, along in rows
    ]
    held = [[None if box is None else read_box(box) for box in of_rank] for of_rank in owners]
    wanted = [[[read_box(box) for box in boxes] for boxes in of_rank] for of_rank in wants]
    return schedule(views, held, wanted, bucket_bytes)
