"""TensorBoard: event files in the run's folder. It needs neither TensorFlow nor torch."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from millrace.train.trackers.base import RunState, TrackedRun, flat

# The signs of Markdown and HTML, as HTML writes them.
AS_TEXT = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*_[]|#~<>&"} | {ord("\n"): "<br>", ord("\r"): " "}


class TensorBoardTracker:
    """Writes event files to `tensorboard/` in the run's folder."""

    advice = "check that there is room on the disk of the run's folder"
    id = None

    def __init__(self, run: TrackedRun) -> None:
        folder = run.folder / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        self._step = 0
        if not run.resumed:
            self._text("config", _table(["setting", "value"], flat(run.config).items()), 0)

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """See `Tracker.start`. Each start writes a file of its own."""
        return cls(run)

    def resumed_at(self, step: int) -> None:
        """See `Tracker.resumed_at`. TensorBoard hides what earlier files have from the next step on."""
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._step = step

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.figures`."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._step = step

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`."""
        self._text("samples", _table(list(rows[0]), [row.values() for row in rows]), step)

    def end(self, state: RunState) -> None:
        """See `Tracker.end`."""
        self._text("state", state.value, self._step)
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, text)))


def _table(head: Sequence[str], rows: Any) -> str:
    """Return a Markdown table, which TensorBoard shows as such. Texts keep their lines, and are shown as they are."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).translate(AS_TEXT)
