"""What one pass of a publish has sent, by checksums, with which the engines' weights are compared."""

from collections import Counter
from collections.abc import Iterator, Mapping

from millrace.errors import EngineFailed, PublishError
from millrace.weights.fingerprint import sampled
from millrace.weights.transports.base import NamedTensors, StagedBucket, Transport


class Sent:
    """The tensors that one pass has sent. samples: the sampled checksum of each tensor, or of each part of one."""

    def __init__(self) -> None:
        self.samples: dict[str, str] = {}
        self._checksums: dict[str, str] = {}  # of each tensor, empty if the transport reads no bytes

    @property
    def record(self) -> Mapping[str, str] | None:
        """The checksum of each tensor, by name; None if the transport reads no bytes."""
        return self._checksums if self._checksums and all(self._checksums.values()) else None

    def staged(self, source: Iterator[NamedTensors], transport: Transport, *, sampling: bool) -> Iterator[StagedBucket]:
        """Return the buckets as the transport stages them. sampling: whether to sample their tensors on the way."""
        if not sampling:
            return transport.staged(source)
        if transport.samples_buckets:
            return self._sampled(transport.staged(source))
        return transport.staged(sampled(source, self.samples))

    def _sampled(self, staged: Iterator[StagedBucket]) -> Iterator[StagedBucket]:
        """Yield the same buckets, and remember the sampled checksums of their tensors when all have been taken."""
        begun = []
        for bucket in staged:
            assert bucket.samples is not None
            begun.append(bucket.samples())  # a GPU computes them while the engines load the bucket
            yield bucket
        for samples in begun:
            self.samples |= samples()

    def add(self, staged: StagedBucket) -> None:
        """Remember the checksums of the tensors in a bucket. Raises PublishError for a tensor that comes twice."""
        repeated = {name for name, count in Counter(staged.names).items() if count > 1}
        if twice := sorted(repeated | (self._checksums.keys() & set(staged.names))):
            raise PublishError(f"the trainer named a tensor twice: {twice[0]}")
        self._checksums |= {name: staged.checksums.get(name, "") for name in staged.names}


def require_same(engine: str, loaded: Mapping[str, str], sent: Mapping[str, str]) -> None:
    """Raise EngineFailed if an engine has loaded other tensors than were sent. Both: the checksums, by name."""
    if loaded == sent:
        return
    if missing := sent.keys() ^ loaded.keys():
        raise EngineFailed(engine, f"only one side has these tensors: {', '.join(sorted(missing)[:3])}")
    if wrong := [name for name, value in sent.items() if loaded[name] != value]:
        raise EngineFailed(engine, f"{len(wrong)} of {len(sent)} tensors are not what was sent, such as {wrong[0]}")
