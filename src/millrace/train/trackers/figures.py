"""What trackers get of a step: its figures by name, and some of its samples as rows. And what Prometheus gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Sample, SampleStatus, text_of
from millrace.serve.view import TrainingView
from millrace.train.metrics import StepMetrics

MOST_ROWS = 8
LONGEST_TEXT = 4000  # characters
OF_TRAINING = frozenset({"kl", "clip_fraction", "logprob_gap", "entropy", "loss", "grad_norm", "lr"})
OF_JUDGE = frozenset({"grade", "grades", "grades_unread", "judge_seconds"})
OF_AGENTS = frozenset({"branches", "requests", "malformed_calls", "duplicated_tokens", "agents_failed"})
SECONDS = "_seconds"


def figures_of(metrics: StepMetrics) -> dict[str, float]:
    """Return the figures of a step by the names that trackers show them under, such as `train/loss`.

    Figures that the step does not have are missing: those of a judge or of agents, if there are none.
    """
    left_out = {"step"} | (set() if metrics.grades else OF_JUDGE) | (set() if metrics.requests else OF_AGENTS)
    record = {field: value for field, value in asdict(metrics).items() if field not in left_out}
    figures = {f"reward/{name}": value for name, value in record.pop("rewards").items()}
    figures |= {f"ends/{name}": value for name, value in record.pop("ends").items()}
    if metrics.reward is None:  # no training step: what it does not have is not 0
        record = {"weight_version": metrics.weight_version, "accuracy": metrics.accuracy}
    return figures | {name_of(field): value for field, value in record.items() if isinstance(value, int | float)}


def training_view(metrics: StepMetrics, before: TrainingView | None) -> TrainingView:
    """Return a step's figures for the metrics server. before: those of the step before, of this process."""
    record = asdict(metrics)
    names = {one.name for one in fields(TrainingView)} - {"samples", "seconds"}
    ended = {status.value: record[f"samples_{status}"] for status in SampleStatus}
    view = TrainingView(
        **{name: record[name] for name in names},
        seconds={name.removesuffix(SECONDS): value for name, value in record.items() if name.endswith(SECONDS)},
        samples=dict(Counter(before.samples if before is not None else {}) + Counter(ended)),
    )
    if metrics.accuracy is None and before is not None:
        view = replace(view, accuracy=before.accuracy)
    return view


def name_of(field: str) -> str:
    """Return the name at trackers of a field of StepMetrics."""
    if field == "accuracy":
        return "eval/accuracy"
    if field.endswith(SECONDS):
        return f"time/{field.removesuffix(SECONDS)}"
    for section, names in (("train", OF_TRAINING), ("judge", OF_JUDGE), ("agent", OF_AGENTS)):
        if field in names:
            return f"{section}/{field}"
    return f"rollout/{field}"


def rows_of(samples: Sequence[Sample], chat: ChatFormat) -> list[Mapping[str, Any]]:
    """Return a few samples of a step as rows of a table, from all over the step. Long texts lack their middle."""
    ended = [sample for sample in samples if sample.episode is not None]
    count = min(MOST_ROWS, len(ended))
    return [_row(ended[index * len(ended) // count], chat) for index in range(count)]


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the values of environment variables, which may be keys."""
    shown = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = dict.fromkeys(value, "***") if name == "env" else without_secrets(value)
        shown[name] = value
    return shown


def _row(sample: Sample, chat: ChatFormat) -> Mapping[str, Any]:
    episode = sample.episode
    assert episode is not None
    first = int(episode.loss_mask.argmax())  # the first token of the model
    prompt = "\n".join(f"{one['role']}: {text_of(one.get('content', ''))}" for one in sample.problem.messages)
    return {
        "sample": sample.sample_id,
        "prompt": _short(prompt),
        "answer": _short(chat.decode(chat.folded(episode.token_ids[first:]))),
        "reward": sample.reward,
        "tokens": sample.generated_tokens,
        "turns": episode.turns,
        "end": episode.end.value,
    }


def _short(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
