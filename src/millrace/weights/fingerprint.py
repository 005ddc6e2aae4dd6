"""The fingerprint of a version's tensors, by sampled checksums."""

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
        """Set the samples in the first pass. Raises WeightsChanged if a later pass gave other tensors."""
        if self.samples is None:
            self.samples = samples
        elif changed := sorted(name for name, _ in samples.items() ^ self.samples.items()):
            raise WeightsChanged(
                f"{len(set(changed))} of {len(self.samples)} tensors have changed since they were published, such as "
                f"{changed[0]}"
            )


def sampled(source: Iterator[NamedTensors], samples: dict[str, str]) -> Iterator[NamedTensors]:
    """Yield the same buckets, and add the sampled checksums of their tensors to `samples`."""
    for tensors in source:
        for device in {tensor.device for _, tensor in tensors}:
            on_device = {name: tensor.detach().contiguous() for name, tensor in tensors if tensor.device == device}
            samples |= zip(on_device, sampled_checksums(list(on_device.values())), strict=True)
        yield tensors
