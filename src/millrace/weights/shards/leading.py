"""What rank 0 does for a version that travels in parts, beside an engine and apart from it."""

import asyncio
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from millrace.buckets import TensorPart, TensorSpec
from millrace.extension.millrace_boxes import Box, common
from millrace.types import Capability
from millrace.weights.shards.plans import EngineRank
from millrace.weights.shards.schedule import Schedule, ShardedView
from millrace.weights.shards.views import NotExchangeable
from millrace.weights.transports.base import PublishTarget

P = ParamSpec("P")
R = TypeVar("R")


async def to_its_end(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a thread, and wait for it even if this is cancelled. The ranks must make their collectives in
    one order, so none may begin before it has ended."""
    running = asyncio.create_task(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def require(capability: Capability, targets: Sequence[PublishTarget]) -> None:
    """Raise NotExchangeable if an engine lacks this way of taking parts."""
    if lacking := [target.engine.name for target in targets if not target.can(capability)]:
        how = " from several ranks" if capability is Capability.SENT_PARTS else ""
        raise NotExchangeable(f"{', '.join(lacking)} can't take parts of tensors{how}")


def require_equal(needs: Sequence[Sequence[Sequence[Sequence[Box]]]]) -> None:
    """Raise NotExchangeable if two engines need different parts. needs: of each engine, rank and tensor."""
    if any(needed != needs[0] for needed in needs):
        raise NotExchangeable("the engines need different parts of the tensors")


def parts_of(schedule: Schedule, number: int, rank: EngineRank) -> tuple[TensorPart, ...]:
    """Return the parts in a round's bucket that a rank of an engine needs."""
    views = schedule.views
    return tuple(
        TensorPart(views[piece.tensor].name, views[piece.tensor].dtype, piece.box, offset)
        for piece, offset in schedule.rounds[number].bucket(rank.beside, schedule.ranks)
        if any(common(piece.box, box) is not None for box in rank.needs[piece.tensor])
    )


def spec_of(view: ShardedView) -> TensorSpec:
    nbytes = view.itemsize
    for size in view.shape:
        nbytes *= size
    return TensorSpec(view.name, view.dtype, view.shape, 0, nbytes)
