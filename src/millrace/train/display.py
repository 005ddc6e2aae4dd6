"""The output of a running training: a live table in a terminal, otherwise one line for each step."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from millrace.train.metrics import StepMetrics

ROWS = 12  # of the live table


class Display:
    """Shows the progress of a run on a console. Use it as `with Display(console).show() as display`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rows: list[StepMetrics] = []
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._bars = {name: self._progress.add_task(name, visible=False) for name in ("warm-up", "steps")}
        self._phase = ""
        self._live: Live | None = None

    @contextmanager
    def show(self) -> Iterator["Display"]:
        """Show the live table while the block runs, if the console is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(self._render(), console=self.console, refresh_per_second=4) as live:
            self._live = live
            yield self
            self._phase = ""
            live.update(self._render())

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        """Show what the run is doing now."""
        self._phase = text
        self._refresh()

    def progress(self, bar: str, completed: int, total: int, detail: str = "") -> None:
        """Update the progress bar `warm-up` or `steps`."""
        self._progress.update(self._bars[bar], completed=completed, total=total, visible=True)
        if detail and not self.console.is_terminal and (completed % max(1, total // 5) == 0 or completed == total):
            self.say(f"{bar} {completed}/{total}: {detail}")
        self._phase = detail
        self._refresh()

    def step(self, metrics: StepMetrics) -> None:
        """Add a training step to the table."""
        self._rows.append(metrics)
        if not self.console.is_terminal:
            self.say(one_line(metrics))
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Group:
        parts: list[Table | Progress | str] = [step_table(self._rows[-ROWS:])] if self._rows else []
        return Group(*parts, self._progress, f"[dim]{self._phase}[/dim]")


def one_line(m: StepMetrics) -> str:
    """Return the figures of a step as one line of text."""
    accuracy = "" if m.accuracy is None else f", accuracy {m.accuracy:.3f}"
    if m.reward is None:
        return f"step {m.step}: version {m.weight_version}{accuracy}"
    return (
        f"step {m.step}: reward {m.reward:.3f}{accuracy}, version {m.weight_version}, "
        f"{m.tokens_per_second:,.0f} tokens/s, "
        f"rollout {m.rollout_seconds:.2f} s, "
        + (f"judge {m.judge_seconds:.2f} s, " if m.judge_seconds else "")
        + f"train {m.train_seconds:.2f} s, publish {m.publish_seconds:.2f} s"
        + (f", sleep freed {m.freed_gib:.2f} GiB" if m.freed_gib else "")
    )


def step_table(rows: list[StepMetrics]) -> Table:
    """Return a table with a row for each step."""
    table = Table()
    columns = "step reward accuracy version staleness tokens/s rollout train publish sleep logprob-gap"
    for name in columns.split():
        table.add_column(name, justify="right")
    for m in rows:
        table.add_row(
            str(m.step),
            _number(m.reward, 3),
            _number(m.accuracy, 3),
            str(m.weight_version),
            _number(m.staleness, 2),
            f"{m.tokens_per_second:,.0f}",
            f"{m.rollout_seconds:.2f} s",
            f"{m.train_seconds:.2f} s",
            f"{m.publish_seconds:.3f} s",
            f"{m.sleep_seconds:.3f} s",
            "" if m.logprob_gap is None else f"{m.logprob_gap:.1e}",
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
