"""The summary of a run says which step its figures are of."""

from collections import Counter
from pathlib import Path

from rich.console import Console

from millrace.rollout.scheduler import SampleCounts
from millrace.train.metrics import StepMetrics
from millrace.train.summary import Summary, print_summary


def shown(*metrics: StepMetrics, resumed_after: int | None = None) -> str:
    console = Console(record=True, width=100, quiet=False)
    summary = Summary(metrics, Path("runs/one"), {"rollout": 1.0}, 2.0, SampleCounts(0, Counter()), resumed_after)
    print_summary(summary, console)
    return console.export_text()


def test_the_last_column_is_of_the_last_step_and_names_that_of_an_older_accuracy() -> None:
    """As when a run is ended between two evaluations."""
    first = StepMetrics(step=0, weight_version=1, accuracy=0.25)
    evaluated = StepMetrics(step=10, weight_version=11, accuracy=0.5, reward=0.3, groups_with_signal=1)
    last = StepMetrics(step=19, weight_version=20, accuracy=None, reward=0.4, groups_with_signal=1)
    text = shown(first, evaluated, last)
    rows = {
        cells[0].strip(): cells[-1].strip() for line in text.splitlines() if len(cells := line.split("│")[1:-1]) > 2
    }
    assert rows["step"] == "19"
    assert rows["weight version"] == "20"
    assert rows["accuracy (held out, greedy)"] == "0.500 (step 10)"
    assert "0.500 (step" not in shown(first, evaluated)


def test_a_resumed_run_says_which_figures_are_of_the_whole_run() -> None:
    steps = [StepMetrics(step=n, weight_version=n + 1, accuracy=0.5, reward=0.3, groups_with_signal=1) for n in (1, 9)]
    text = shown(*steps, resumed_after=4)
    assert "one: first and last of the whole run" in text
    assert "since it was resumed after step 4: 2 s in all" in text
    assert "since it was resumed after step 4: 0 samples asked for" in text
    assert "resumed" not in shown(*steps)
    assert "whole" not in shown(*steps)
