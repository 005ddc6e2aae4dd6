"""Sends each rank of an engine the parts of sharded tensors that it needs, without gathering them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from millrace.weights.source import WeightSource
from millrace.weights.transports.base import PublishTarget, Transport


@asynccontextmanager
async def way_for(
    source: WeightSource, targets: Sequence[PublishTarget], transport: Transport, *, bucket_bytes: int, deadline: float
) -> AsyncIterator[Transport]:
    """Yield the transport for one version: `transport`, or an exchange among the trainer's ranks if `source` is sharded
    and all engines can take part. The arguments are those of `transport.exchanging`."""
    exchange = None
    if source.led is not None:
        from millrace.weights.shards.transport import exchanging  # imports torch

        exchange = await exchanging(source, targets, transport, bucket_bytes=bucket_bytes, deadline=deadline)
    if exchange is None:
        yield transport
        return
    try:
        yield exchange
    finally:
        await exchange.close()
