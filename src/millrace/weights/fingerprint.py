"""Which tensors a version was published with, by sampled checksums."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from millrace.checksum import sampled_checksums
from millrace.errors import WeightsChanged
from millrace.weights.transports.base import NamedTensors


@dataclass(slots=True)
class Fingerprint:
    """The sampled checksums of a version's tensors, by name. The first pass over the tensors sets them."""

    samples: Mapping[str, str] | None = None

    def require(self, samples: Mapping[str, str]) -> None:
        """Raises WeightsChanged where another pass gave other tensors than the first."""
        if self.samples is None:
            self.samples = samples
        elif changed := sorted(name for name, _ in samples.items() ^ self.samples.items()):
            raise WeightsChanged(
                f"{len(set(changed))} of {len(self.samples)} tensors have changed since they were published, "
                f"{changed[0]} among them"
            )


def sampled(source: Iterator[NamedTensors], samples: dict[str, str]) -> Iterator[NamedTensors]:
    """The same buckets; `samples` gets the sampled checksums of each that has been taken."""
    for tensors in source:
        for device in {tensor.device for _, tensor in tensors}:
            there = {name: tensor.detach().contiguous() for name, tensor in tensors if tensor.device == device}
            samples |= zip(there, sampled_checksums(list(there.values())), strict=True)
        yield tensors
