"""Who sends which part of which tensor to whom: every element that is wanted comes once, from its owner."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import PublishError
from millrace.extension.millrace_boxes import Box, box_of, common, disjoint, elements, shape_of, whole, without
from millrace.weights.plan import padded
from millrace.weights.shards.schedule import Schedule, ShardedView, read_schedule, schedule, written

Shape = tuple[int, ...]
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return tuple((start, draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True))


def inside(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, end) for start, end in box)))


@given(st.data())
def test_the_rest_of_a_box_and_what_is_common_are_the_whole_box(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    both = common(one, other)
    rest = without(one, other)
    assert (inside(both) if both is not None else set()) == inside(one) & inside(other)
    assert set().union(*map(inside, rest)) == inside(one) - inside(other)
    assert sum(map(elements, rest)) == len(inside(one) - inside(other))


@given(st.data())
def test_boxes_become_disjoint_and_still_contain_all(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    given_boxes = data.draw(st.lists(boxes(shape), max_size=4))
    found = disjoint(given_boxes)
    assert all(common(one, other) is None for one, other in itertools.combinations(found, 2))
    assert all(any(inside(box) <= inside(one) for one in found) for box in given_boxes)


@given(st.data())
def test_a_sliced_and_permuted_view_is_a_box(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(boxes(shape))
    whole_array = np.arange(math.prod(shape), dtype=np.int8).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    view = whole_array[tuple(slice(start, end) for start, end in box)].transpose(order)
    offset = (view.__array_interface__["data"][0] - whole_array.__array_interface__["data"][0]) // view.itemsize
    found = box_of(shape, offset, view.shape, view.strides)
    assert found is not None
    assert found[0] == box
    for dim, along in enumerate(found[1]):
        assert along == order[dim] if view.shape[dim] > 1 else along is None


@pytest.mark.parametrize(
    ("offset", "view", "strides"),
    [
        (0, (6,), (1,)),  # over the end of a row
        (0, (2,), (8,)),  # every other row
        (1, (2, 2), (1, 1)),  # two dimensions along one
        (3, (2,), (1,)),  # from the end of a row
    ],
)
def test_other_views_are_no_boxes(offset: int, view: Shape, strides: Shape) -> None:
    assert box_of((4, 4), offset, view, strides) is None


@st.composite
def problems(
    draw: st.DrawFn,
) -> tuple[list[ShardedView], list[list[Box | None]], list[list[list[Box]]], list[Shape]]:
    """Trainer's tensors that ranks hold by rows, by columns, whole, or in overlapping parts, and views of them."""
    ranks = draw(st.integers(1, 4))
    sources = draw(st.lists(shapes, min_size=1, max_size=3))
    owners: list[list[Box | None]] = [[] for _ in range(ranks)]
    for shape in sources:
        form = draw(st.sampled_from(["rows", "columns", "whole", "some"]))
        for rank, held in enumerate(owners):
            held.append(owned(form, shape, rank, ranks))
    views = []
    for index, shape in enumerate(sources):
        for number in range(draw(st.integers(1, 2))):
            box = draw(boxes(shape))
            order = [dim for dim in draw(st.permutations(range(len(shape)))) if shape_of(box)[dim] > 1]
            dtype, itemsize = draw(st.sampled_from([("bfloat16", 2), ("float32", 4)]))
            views.append(ShardedView(f"{index}.{number}", dtype, itemsize, index, box, tuple(order)))
    wants = [[disjoint(draw(st.lists(boxes(view.shape), max_size=2))) for view in views] for _ in range(ranks)]
    return views, owners, wants, sources


def owned(form: str, shape: Shape, rank: int, ranks: int) -> Box | None:
    """As torch splits a dimension: in equal pieces from the start, and the last ranks may have none."""
    if form == "whole" or (form == "some" and rank == 0):
        return whole(shape)
    dim = len(shape) - 1 if form == "columns" else 0
    each = -(-shape[dim] // ranks)
    start, end = min(rank * each, shape[dim]), min((rank + 1) * each, shape[dim])
    return (*whole(shape[:dim]), (start, end), *whole(shape[dim + 1 :])) if start < end else None


@given(problems(), st.integers(96, 400))
def test_every_wanted_element_comes_once_and_from_the_rank_itself_if_it_has_it(
    problem: tuple[list[ShardedView], list[list[Box | None]], list[list[list[Box]]], list[Shape]], bucket_bytes: int
) -> None:
    views, owners, wants, _ = problem
    made = schedule(views, owners, wants, bucket_bytes)
    arrived: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    crossed = 0
    for piece in (piece for one in made.rounds for piece in one.pieces):
        view = views[piece.tensor]
        assert piece.nbytes == elements(piece.box) * view.itemsize
        own, source = owners[piece.sender][view.source], view.to_source(piece.box)
        assert own is not None
        assert common(own, source) == source
        assert view.from_source(source) == piece.box
        if piece.sender != piece.receiver:
            crossed += piece.nbytes
        arrived.update((piece.receiver, piece.tensor, place) for place in inside(piece.box))
    wanted = {
        (rank, index, place)
        for rank, of_rank in enumerate(wants)
        for index, of_view in enumerate(of_rank)
        for box in of_view
        for place in inside(box)
    }
    assert arrived == Counter(dict.fromkeys(wanted, 1))
    assert crossed == sum(not_local(views[index], owners[rank], place) for rank, index, place in wanted)
    assert sorted(name for one in made.rounds for name in one.names) == sorted(view.name for view in views)
    require_room(made, bucket_bytes)
    require_places(made)
    assert read_schedule(written(views, owners, wants, bucket_bytes)) == made


@given(problems(), st.data(), st.integers(64, 400))
def test_ranks_of_engines_that_are_apart_get_every_element_once(
    problem: tuple[list[ShardedView], list[list[Box | None]], list[list[list[Box]]], list[Shape]],
    data: st.DataObject,
    bucket_bytes: int,
) -> None:
    views, owners, of_engines, _ = problem
    receivers = data.draw(st.integers(1, 3))
    nothing: list[list[list[Box]]] = [[[] for _ in views] for _ in owners]
    wants = nothing + [of_engines[number % len(of_engines)] for number in range(receivers)]
    made = schedule(views, owners, wants, bucket_bytes)
    pieces = [piece for one in made.rounds for piece in one.pieces]
    assert all(piece.sender < len(owners) <= piece.receiver for piece in pieces)
    arrived = Counter((p.receiver, p.tensor, place) for p in pieces for place in inside(p.box))
    wanted = (
        (rank, index, place)
        for rank, of_rank in enumerate(wants)
        for index, of_view in enumerate(of_rank)
        for box in of_view
        for place in inside(box)
    )
    assert arrived == Counter(wanted)
    for rank in range(made.ranks):
        assert max(made.slot_bytes(rank), made.outgoing_bytes(rank)) <= bucket_bytes
    require_places(made)


def not_local(view: ShardedView, held: Sequence[Box | None], place: tuple[int, ...]) -> int:
    """The bytes of one element of a view that this rank does not have."""
    own = held[view.source]
    element = view.to_source(tuple((at, at + 1) for at in place))
    return 0 if own is not None and common(own, element) is not None else view.itemsize


def require_room(made: Schedule, bucket_bytes: int) -> None:
    for rank in range(made.ranks):
        assert 2 * made.slot_bytes(rank) + made.outgoing_bytes(rank) <= 2 * bucket_bytes


def require_places(made: Schedule) -> None:
    """No two pieces overlap in a bucket, and what a rank sends is in the order in which it arrives."""
    for one in made.rounds:
        for rank in range(made.ranks):
            for placed in (list(one.bucket(rank, made.ranks)), list(one.outgoing(rank, made.ranks))):
                ends = 0
                for piece, offset in sorted(placed, key=lambda pair: pair[1]):
                    assert offset == ends
                    ends += padded(piece.nbytes)
            first = sum(one.received(rank, made.ranks))
            assert all((at < first) == (piece.sender != rank) for piece, at in one.bucket(rank, made.ranks))
            for other in range(made.ranks):
                assert one.sent(rank, made.ranks)[other] == one.received(other, made.ranks)[rank]
                sent = [piece for piece, _ in one.outgoing(rank, made.ranks) if piece.receiver == other]
                if other != rank:
                    assert sent == [piece for piece, _ in one.bucket(other, made.ranks) if piece.sender == rank]


def test_what_no_rank_has_is_named() -> None:
    view = ShardedView("w", "float32", 4, 0, ((0, 4), (0, 2)), (0, 1))
    with pytest.raises(PublishError, match=r"no rank of the trainer has w from \(\(2, 4\), \(0, 2\)\)"):
        schedule([view], [[((0, 2), (0, 2))], [None]], [[[((0, 4), (0, 2))]], [[]]], 1024)
