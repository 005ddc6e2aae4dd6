"""The parameters of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Held:
    """What was read of a model's parameters, which takes a millisecond or two.

    addresses: where each parameter is in memory. elements: the size of each parameter that a whole version fills.
    """

    addresses: Mapping[str, int]
    elements: Mapping[str, int]

    @classmethod
    def by(cls, model: torch.nn.Module) -> "Held":
        """Look at a model."""
        found = dict(model.named_parameters())
        elements = {name: one.numel() for name, one in found.items() if is_needed(one)}
        return cls(addresses_of(found.items()), elements)

    def missing(self, written: Mapping[str, int]) -> list[str]:
        """Return the parameters that have not been written whole, in alphabetical order.

        written: how many elements of each have been written.
        """
        return sorted(name for name, count in self.elements.items() if written.get(name, 0) < count)


def addresses_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return where parameters are in memory, by name."""
    return {name: parameter.data_ptr() for name, parameter in parameters}


def is_needed(parameter: torch.Tensor) -> bool:
    """Return whether a whole version has content for a parameter. SGLang marks those that few checkpoints have, such as
    the scales of a KV cache, and sets them itself."""
    return not getattr(parameter, "_skip_weight_check", False)
