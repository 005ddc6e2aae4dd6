"""The weights of TRL's `AsyncGRPOTrainer` on a fleet."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from accelerate import PartialState

from millrace.errors import ArgumentError
from millrace.sync import Fleet

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class FleetWeights:
    """A `weight_transfer` for `AsyncGRPOTrainer` that publishes to a fleet.

    The engines generate while they load a version, or continue after it, as in every publish (docs/weights.md). So
    `pause` and `resume` do nothing.

    `published`: how many versions were published, which is the trainer's `model_version`.
    """

    def __init__(self, fleet: Fleet) -> None:
        if not isinstance(fleet, Fleet):
            raise ArgumentError(f"fleet must be one of millrace.sync.open_fleet, and is a {type(fleet).__name__}")
        self.fleet = fleet
        self.published = 0
        self._numbers: dict[int, int] = {}  # the trainer's numbers, by the fleet's

    def init_weight_transfer(self) -> None:
        """Do nothing: the fleet is open."""

    def pause(self) -> None:
        """Do nothing: a publish interrupts what it must."""

    def send_weights(self, iterator: "Iterator[tuple[str, torch.Tensor]]") -> None:
        """Publish the tensors. Raises PublishError if no engine takes them."""
        # With several ranks, each tensor is gathered when it is read, and must not be kept.
        one_rank = PartialState().num_processes == 1
        tensors = list(iterator) if one_rank else iterator
        try:
            report = self.fleet.publish(tensors, label=self.published + 1)
        finally:
            for _ in iterator:
                pass  # the other ranks take part in gathering each tensor, also those that an error left over
        for name, error in report.failed.items():
            logger.warning("%s did not take version %d: %s", name, report.version, error)
        self.published += 1
        self._numbers[report.version] = self.published

    def model_version(self, version: int | None) -> int:
        """Return the trainer's `model_version` for a version of the fleet; 0 if `send_weights` did not publish it."""
        return 0 if version is None else self._numbers.get(version, 0)

    def resume(self) -> None:
        """Do nothing: see `pause`."""

    def destroy(self) -> None:
        """Do nothing: the fleet's own block ends it."""
