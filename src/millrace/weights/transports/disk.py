"""A transport for a trainer and engines that share a file system: engines read each version from its folder in the
store."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from millrace.buckets import DiskBucket
from millrace.errors import EngineError, PublishError
from millrace.types import Capability
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport, TransportContext


class DiskTransport(Transport):
    """A transport whose engines read the store's folders by their path."""

    needs = frozenset({Capability.UPDATE_FROM_DISK})

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        if context.store is None or not context.store.shared:
            raise PublishError(
                "the transport disk needs a folder that the engines can read; set publish.folder, or pass folder to "
                "open_fleet"
            )
        return cls(context.store)

    def __init__(self, store: VersionStore) -> None:
        self._store = store
        self._version = 0

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002 (any engine can read the folder)
        version: int,
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        self._version = version
        return {}

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """Yield one bucket, after the whole version was written. Raises PublishError if it can't be written."""
        written = self._store.write(self._version, buckets)
        for _ in buckets:  # if the version was written before: the publisher samples the tensors that pass through
            pass
        bucket = DiskBucket(str(written.path))
        yield StagedBucket(lambda _: bucket, written.checksums, tuple(written.checksums), written.nbytes)

    async def close(self) -> None:
        """Does nothing: the versions stay in the store."""
