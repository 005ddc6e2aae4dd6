"""Trainer and engines that share a path and nothing else: a version is a folder of the store, which the engines read by
themselves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from millrace.errors import EngineError, PublishError
from millrace.types import Capability, DiskBucket
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport, TransportContext


class DiskTransport(Transport):
    """Engines read the store's folders by their path."""

    needs = frozenset({Capability.UPDATE_FROM_DISK})

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        if context.store is None or not context.store.shared:
            raise PublishError("publish.transport is disk, and publish.folder names no path that engines can read")
        return cls(context.store)

    def __init__(self, store: VersionStore) -> None:
        self._store = store
        self._version = 0

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002 (whoever can read may come)
        version: int,
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        self._version = version
        return {}

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """One, when all is written. Raises PublishError where it can't be."""
        written = self._store.write(self._version, buckets)
        for _ in buckets:  # of a version that was written before: the publisher samples what goes by
            pass
        bucket = DiskBucket(str(written.path))
        yield StagedBucket(lambda _: bucket, written.checksums, tuple(written.checksums), written.nbytes)

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the engines read by themselves)
        return

    async def close(self) -> None:
        """The store's versions stay."""
