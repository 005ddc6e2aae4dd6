"""The port to an experiment tracker. An adapter runs in a process of its own, so its calls may take long."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self


class RunState(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # by a signal


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that a tracker records.

    project: None is the tracker's own default. folder: the run's. config: the run's settings, without secrets. id:
    what the tracker has called the run before; None for a run that is new there. resumed: whether the trainer continues
    a run.
    """

    name: str
    project: str | None
    folder: Path
    config: Mapping[str, Any]
    id: str | None = None
    resumed: bool = False


class Tracker(Protocol):
    """Records one run.

    id: the tracker's own name of the run, by which a resumed run continues it; None if it needs none. where: where the
    run can be looked at, in words for a person.

        tracker = WandbTracker.start(run)
        tracker.figures(1, {"rollout/reward": 0.25, "time/train": 3.1})
        tracker.samples(1, [{"sample": "p7-0", "prompt": "2+2", "answer": "4", "reward": 1.0}])
        tracker.end(RunState.FINISHED)

    A call may raise anything. `advice` says what a user can do if `start` does.
    """

    advice: str
    id: str | None
    where: str

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """Start a run at the tracker, or continue one."""

    def resumed_at(self, step: int) -> None:
        """Forget what was recorded of steps after `step`, if the tracker can: the trainer does them again."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a step, by name."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record some samples of a step, as a table. All rows have the same keys."""

    def end(self, state: RunState) -> None:
        """Write what is not yet written, and end the run at the tracker."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings by dotted name, each as text. A list is one setting."""
    settings: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = str(value)
    return settings
