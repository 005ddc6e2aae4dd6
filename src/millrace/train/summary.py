"""The end of a run: its first and its last figures, and where its time went."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from millrace.train.record import StepMetrics


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to. `seconds` are of this process: a resumed run counts its own steps only."""

    first: StepMetrics
    last: StepMetrics
    first_step: StepMetrics
    folder: Path
    seconds: dict[str, float]
    total_seconds: float

    @property
    def overhead(self) -> float:
        """The share of wall time in which neither engines generated nor the trainer trained."""
        busy = sum(self.seconds[name] for name in ("warm-up", "rollouts", "training", "evaluations"))
        return 1 - busy / self.total_seconds


def summarize(
    metrics: Sequence[StepMetrics], folder: Path, total_seconds: float, warmup_seconds: float, set_up_seconds: float
) -> Summary:
    evaluated = [m for m in metrics if m.accuracy is not None]
    steps = [m for m in metrics if m.reward is not None]
    seconds = {
        "set-up": set_up_seconds,
        "warm-up": warmup_seconds,
        "rollouts": sum(m.rollout_seconds for m in steps),
        "training": sum(m.train_seconds for m in steps),
        "evaluations": sum(m.evaluation_seconds for m in steps),
        "publishing": sum(m.publish_seconds for m in steps),
        "sleep and wake": sum(m.sleep_seconds for m in steps),
        "checkpoints": sum(m.checkpoint_seconds for m in steps),
    }
    return Summary(evaluated[0], evaluated[-1], steps[0], folder, seconds, total_seconds)


def print_summary(summary: Summary, console: Console) -> None:
    table = Table(title=f"{summary.folder.name}: first and last")
    for name in ("", "first", "last"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("step", str(summary.first.step), str(summary.last.step))
    table.add_row("accuracy (held out, greedy)", f"{summary.first.accuracy:.3f}", f"{summary.last.accuracy:.3f}")
    table.add_row("reward (training samples)", f"{summary.first_step.reward:.3f}", f"{summary.last.reward:.3f}")
    table.add_row("weight version", str(summary.first.weight_version), str(summary.last.weight_version))
    table.add_row(
        "tokens/s of the rollouts",
        f"{summary.first_step.tokens_per_second:,.0f}",
        f"{summary.last.tokens_per_second:,.0f}",
    )
    console.print(table)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary.seconds.items())
    console.print(
        f"{summary.total_seconds:.0f} s in all: {parts}; "
        f"neither generating nor training {100 * summary.overhead:.1f} %",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"curves, samples, metrics and checkpoints are in {summary.folder}", highlight=False, soft_wrap=True)
