"""The folder that the engines were started with: they read it anew by themselves, and nothing is sent."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from millrace.types import DiskBucket
from millrace.weights.transports.base import NamedTensors, StagedBucket, Transport


class FolderTransport(Transport):
    """For engines with Capability.UPDATE_FROM_DISK, whose own model's folder is `folder` and has these checksums."""

    def __init__(self, folder: Path, checksums: Mapping[str, str]) -> None:
        self._folder, self._checksums = folder, checksums

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """One. The folder's tensors are gone through all the same: the publisher samples what goes by."""
        nbytes = sum(tensor.nbytes for tensors in buckets for _, tensor in tensors)
        bucket = DiskBucket(str(self._folder))
        yield StagedBucket(lambda _: bucket, self._checksums, tuple(self._checksums), nbytes)

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the engines read by themselves)
        return

    async def close(self) -> None:
        """The folder is somebody else's."""
