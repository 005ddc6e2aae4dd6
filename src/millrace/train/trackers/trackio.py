"""Trackio, Hugging Face's local-first tracker."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import trackio

from millrace.train.trackers.base import RunState, TrackedRun


class TrackioTracker:
    """Records a run by Trackio: on this host, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    advice = "check TRACKIO_SPACE_ID and TRACKIO_SERVER_URL; without them, Trackio writes to this host"

    def __init__(self, run: TrackedRun) -> None:
        project = run.project or "millrace"
        self.id = run.id or run.name  # Trackio continues the last run of a name
        resume = "never" if run.id is None else "allow"
        trackio.init(project=project, name=self.id, config=dict(run.config), resume=resume, embed=False)
        self.where = f'trackio show --project "{project}"'

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """See `Tracker.start`."""
        return cls(run)

    def resumed_at(self, step: int) -> None:
        """See `Tracker.resumed_at`. Trackio keeps what it has; the steps that are done again have two points."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.figures`."""
        trackio.log(dict(figures), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`."""
        trackio.log({"samples": trackio.Table(data=[dict(row) for row in rows])}, step=step)

    def end(self, state: RunState) -> None:
        """See `Tracker.end`. Trackio has no state of a run, so one that did not finish gets an alert."""
        if state is not RunState.FINISHED:
            trackio.alert(f"the run {'has failed' if state is RunState.FAILED else 'was interrupted'}")
        trackio.finish()
