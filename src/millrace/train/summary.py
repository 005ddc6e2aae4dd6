"""The summary of a run: its first and last figures, and the seconds of each phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from millrace.rollout.sample import SampleStatus
from millrace.rollout.scheduler import SampleCounts
from millrace.train.metrics import StepMetrics

# The stopwatch's names and how they are printed, in this order. The busy ones generate or train.
PHASES = {
    "set-up": "set-up",
    "warm-up": "warm-up",
    "rollout": "rollouts",
    "judge": "judging",
    "train": "training",
    "evaluation": "evaluations",
    "publish": "publishing",
    "sleep": "sleep and wake",
    "checkpoint": "checkpoints",
}
BUSY = ("warm-up", "rollout", "judge", "train", "evaluation")


@dataclass(frozen=True, slots=True)
class Summary:
    """The results of a run.

    metrics: of the whole run. seconds, total_seconds, counts: of this process. resumed_after: the step after which this
    process resumed the run; None if it began the run.
    """

    metrics: Sequence[StepMetrics]
    folder: Path
    seconds: Mapping[str, float]
    total_seconds: float
    counts: SampleCounts
    resumed_after: int | None = None

    @property
    def overhead(self) -> float:
        """The share of wall time in which neither engines generated nor the trainer trained."""
        return 1 - sum(self.seconds.get(name, 0.0) for name in BUSY) / self.total_seconds


def print_summary(summary: Summary, console: Console) -> None:
    """Print a summary to a console."""
    evaluated = [m for m in summary.metrics if m.accuracy is not None]
    steps = [m for m in summary.metrics if m.reward is not None]
    if evaluated and steps:  # a run that is resumed at its end may have no records
        of_all = "" if summary.resumed_after is None else " of the whole run"
        table = Table(title=f"{summary.folder.name}: first and last{of_all}", title_justify="left")
        for name in ("", "first", "last"):
            table.add_column(name, justify="left" if not name else "right")
        table.add_row("step", str(evaluated[0].step), str(steps[-1].step))
        of = "" if evaluated[-1].step == steps[-1].step else f" (step {evaluated[-1].step})"
        last = f"{evaluated[-1].accuracy:.3f}{of}"
        table.add_row("accuracy (held out, greedy)", f"{evaluated[0].accuracy:.3f}", last)
        table.add_row("reward (training samples)", f"{steps[0].reward:.3f}", f"{steps[-1].reward:.3f}")
        if len(steps[-1].rewards) > 1:
            for name, value in steps[-1].rewards.items():
                first = steps[0].rewards.get(name)
                table.add_row(f"  {name}", "" if first is None else f"{first:.3f}", f"{value:.3f}")
        table.add_row("weight version", str(evaluated[0].weight_version), str(steps[-1].weight_version))
        table.add_row("tokens/s", f"{steps[0].tokens_per_second:,.0f}", f"{steps[-1].tokens_per_second:,.0f}")
        console.print(table)
    if empty := sum(m.groups_with_signal == 0 for m in steps):
        useful = "No step" if empty == len(steps) else f"{len(steps) - empty} of {len(steps)} steps"
        console.print(
            f"{useful} had a group whose rewards differed: without that every advantage is 0, and nothing is learned.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    parts = [f"{label} {summary.seconds[name]:.1f}" for name, label in PHASES.items() if name in summary.seconds]
    ended = [f"{summary.counts.ended[status]} {status}" for status in SampleStatus]
    since = "" if summary.resumed_after is None else f"since it was resumed after step {summary.resumed_after}: "
    for line in (
        f"{since}{summary.total_seconds:.0f} s in all: {', '.join(parts)}; "
        f"neither generating nor training {100 * summary.overhead:.1f} %",
        f"{since}{summary.counts.asked} samples asked for: {', '.join(ended)}",
        f"curves, samples, metrics and checkpoints are in {summary.folder}",
        f"millrace view {summary.folder} shows them in the browser",
    ):
        console.print(line, highlight=False, soft_wrap=True)
