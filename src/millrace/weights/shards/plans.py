"""The plan of a fleet's last exchange, which the next one usually repeats. Making it takes seconds for a model of many
experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from millrace.extension.millrace_boxes import Box, disjoint
from millrace.weights.shards.exchange import RankPlace
from millrace.weights.shards.schedule import ShardedView, read_schedule, written
from millrace.weights.shards.views import metas, views_of
from millrace.weights.source import WeightSource
from millrace.weights.transports.base import Transport

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineRank:
    """A rank of an engine.

    beside: the rank whose bucket it reads: of the trainer, or its own number if it is apart. needs: the boxes of each
    view that it needs.
    """

    beside: int
    needs: Sequence[Sequence[Box]]


class Plans:
    """Remembers the views and the schedule of the last exchange."""

    def __init__(self) -> None:
        self._given: object = None
        self._views: list[ShardedView] = []
        self._asked: object = None
        self._schedule = b""
        self._made: dict[object, object] = {}

    def views(self, source: WeightSource, tensors: Mapping[str, Tensor]) -> list[ShardedView]:
        """Return what `views_of` returns. All sources of a fleet convert the same tensors in the same way."""
        first: dict[int, int] = {}  # of the names of one tensor
        alike = [first.setdefault(id(tensor), index) for index, tensor in enumerate(list(metas(tensors).values()))]
        given = [(name, t.shape, t.dtype) for name, t in tensors.items()], alike, source.shapes()
        if given != self._given:
            self._views, self._given = views_of(source, tensors), given
        return self._views

    def schedule(
        self,
        views: Sequence[ShardedView],
        ranks: Sequence[RankPlace],
        engines: Mapping[str, Sequence[EngineRank]],
        bucket_bytes: int,
    ) -> bytes:
        """Return the schedule as JSON. Raises PublishError as `schedule.schedule` does."""
        asked = list(views), list(ranks), dict(engines), bucket_bytes
        if asked != self._asked:
            receivers = max(1 + rank.beside for of_engine in engines.values() for rank in of_engine)
            wants = wants_of(engines, max(receivers, len(ranks)), len(views))
            self._schedule = written(views, [rank.boxes for rank in ranks], wants, bucket_bytes)
            self._asked, self._made = asked, {}
        read_schedule(self._schedule)  # raises before the other ranks take part
        return self._schedule

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return what `make` has returned for this key since the schedule was made."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


PLANS: "WeakKeyDictionary[Transport, Plans]" = WeakKeyDictionary()  # by the fleet's transport


def wants_of(engines: Mapping[str, Sequence[EngineRank]], ranks: int, views: int) -> list[list[list[Box]]]:
    """Return the boxes of each view that go into the buckets of each rank. They do not overlap."""
    wants: list[list[list[Box]]] = [[[] for _ in range(views)] for _ in range(ranks)]
    for of_engine in engines.values():
        for rank in of_engine:
            for boxes, needed in zip(wants[rank.beside], rank.needs, strict=True):
                boxes += needed
    return [[disjoint(boxes) for boxes in of_rank] for of_rank in wants]
