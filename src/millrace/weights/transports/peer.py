"""A transport that sends nothing: an engine that joins reads the weights of another one."""

from collections.abc import Iterator, Mapping

from millrace.buckets import PeerBucket
from millrace.weights.transports.base import NamedTensors, StagedBucket, Transport


class PeerTransport(Transport):
    """A transport for one engine with Capability.UPDATE_FROM_PEER.

    offered: what the other engine offers. checksums: of each tensor of the version, as they were recorded when it was
    published, by name.
    """

    def __init__(self, offered: PeerBucket, checksums: Mapping[str, str]) -> None:
        self._offered, self._checksums = offered, checksums

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:  # noqa: ARG002
        """Yield one bucket. The tensors do not pass through this process."""
        yield StagedBucket(lambda _: self._offered, self._checksums, tuple(self._checksums), 0)

    async def close(self) -> None:
        """Does nothing: the other engine goes on."""
