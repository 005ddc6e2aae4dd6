"""MLflow."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import mlflow

from millrace.train.trackers.base import RunState, TrackedRun, flat

STATES = {RunState.FINISHED: "FINISHED", RunState.FAILED: "FAILED", RunState.INTERRUPTED: "KILLED"}
MOST_PARAMS, LONGEST_PARAM = 100, 500  # that every store of MLflow takes in one call, and in one value
OWN_EXPERIMENT = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")


class MLflowTracker:
    """Records a run by MLflow, in the store that MLFLOW_TRACKING_URI names."""

    advice = "check MLFLOW_TRACKING_URI; without it, MLflow writes to mlflow.db in the working folder"

    def __init__(self, run: TrackedRun) -> None:
        if run.project is not None or not any(name in os.environ for name in OWN_EXPERIMENT):
            mlflow.set_experiment(run.project or "millrace")
        active = mlflow.start_run(run_id=run.id) if run.id is not None else mlflow.start_run(run_name=run.name)
        self.id = active.info.run_id
        self.where = f"MLflow, {mlflow.get_tracking_uri()}, run {self.id}"
        if run.id is None:
            params = [(name, value[:LONGEST_PARAM]) for name, value in flat(run.config).items()]
            for first in range(0, len(params), MOST_PARAMS):
                mlflow.log_params(dict(params[first : first + MOST_PARAMS]))
        mlflow.log_dict(dict(run.config), "config.yaml")

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """See `Tracker.start`."""
        return cls(run)

    def resumed_at(self, step: int) -> None:
        """See `Tracker.resumed_at`. MLflow keeps what it has; the steps that are done again have two points."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.figures`."""
        mlflow.log_metrics({re.sub(r"[^\w\-. /:]", "_", name): value for name, value in figures.items()}, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`. Each step has a file of its own: to add a row, MLflow writes the whole file again."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        mlflow.log_table(columns, artifact_file=f"samples/step-{step:06}.json")

    def end(self, state: RunState) -> None:
        """See `Tracker.end`."""
        mlflow.end_run(STATES[state])
