"""A transport that sends nothing: engines read the folder of their own model again."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from millrace.buckets import DiskBucket
from millrace.weights.transports.base import NamedTensors, StagedBucket, Transport


class FolderTransport(Transport):
    """A transport for engines with Capability.UPDATE_FROM_DISK that were started with the model in `folder`.

    checksums: the checksum of each tensor in the folder, by name.
    """

    def __init__(self, folder: Path, checksums: Mapping[str, str]) -> None:
        self._folder, self._checksums = folder, checksums

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """Yield one bucket. Iterates over the tensors, because the publisher samples those that pass through."""
        nbytes = sum(tensor.nbytes for tensors in buckets for _, tensor in tensors)
        bucket = DiskBucket(str(self._folder))
        yield StagedBucket(lambda _: bucket, self._checksums, tuple(self._checksums), nbytes)

    async def close(self) -> None:
        """Does nothing: the folder stays."""
