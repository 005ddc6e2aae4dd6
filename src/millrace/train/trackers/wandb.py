"""Weights & Biases."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import wandb

from millrace.train.trackers.base import RunState, TrackedRun

STEP = "step"
EXIT_CODES = {RunState.FINISHED: 0, RunState.FAILED: 1, RunState.INTERRUPTED: 255}  # as wandb's own hooks set them


class WandbTracker:
    """Records a run by wandb, in the mode that WANDB_MODE or wandb's settings say.

    Its files are in `wandb/` in the run's folder, unless WANDB_DIR names another place.
    """

    advice = "log in by `wandb login`, or set WANDB_MODE=offline and send the run later by `wandb sync`"

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=run.project or os.environ.get("WANDB_PROJECT") or "millrace",
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=os.environ.get("WANDB_DIR") or run.folder,
            config=dict(run.config),
            id=run.id,
            resume="allow" if run.id is not None else None,
        )
        self.id = self._run.id
        later = f"wandb sync {os.path.dirname(self._run.dir)}" if self._run.offline else "nowhere, since it is disabled"
        self.where = self._run.url or later
        # wandb's own steps only grow, and a resumed run does some steps again.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """See `Tracker.start`."""
        return cls(run)

    def resumed_at(self, step: int) -> None:
        """See `Tracker.resumed_at`. wandb keeps what it has; the steps that are done again have two points."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.figures`."""
        self._run.log({STEP: step, **figures})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`. Each step has a table of its own."""
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({STEP: step, "samples": table})

    def end(self, state: RunState) -> None:
        """See `Tracker.end`."""
        self._run.summary["state"] = state.value
        self._run.finish(exit_code=EXIT_CODES[state])
