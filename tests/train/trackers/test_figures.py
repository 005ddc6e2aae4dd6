"""What trackers and Prometheus get of a step."""

from dataclasses import asdict, fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.chat import check_chat_format
from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.train.metrics import StepMetrics
from millrace.train.tiny import make_tiny_tokenizer
from millrace.train.trackers.figures import (
    LONGEST_TEXT,
    MOST_ROWS,
    figures_of,
    name_of,
    rows_of,
    training_view,
    without_secrets,
)

CHAT = check_chat_format(make_tiny_tokenizer(), "model", (), {})
FULL = StepMetrics(
    3, 4, 0.5, reward=0.25, rewards={"exact": 0.5, "style": 0.0}, staleness=1.0, kl=0.1, clip_fraction=0.2, entropy=1.5,
    logprob_gap=1e-4, loss=-0.1, grad_norm=2.0, lr=1e-5, grade=3.0, grades=8, branches=2.0, requests=9,
    samples_finished=16, ends={"answered": 16}, samples_failed=1, groups_with_signal=2, train_seconds=1.5,
)  # fmt: skip


def sample(name: str, question: str = "2 + 2", episode: bool = True) -> Sample:
    prompt, answer = CHAT.prompt("2 + 2"), CHAT.turn("#### 4")
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    played = Episode((*prompt, *answer), mask, np.zeros(len(mask), np.float32), (), 1, EpisodeEnd.ANSWERED)
    status = SampleStatus.FINISHED if episode else SampleStatus.FAILED
    return Sample(name, "g", Problem.of_question("p", question, "4"), status, played if episode else None, 1.0)


def test_every_figure_of_a_step_has_a_name_of_its_own() -> None:
    figures = figures_of(FULL)
    names = [name_of(field.name) for field in fields(StepMetrics) if field.name not in ("step", "rewards", "ends")]
    assert sorted(figures) == sorted({*names, "reward/exact", "reward/style", "ends/answered"})
    assert len(names) == len(set(names))
    assert {"train/loss", "train/lr", "rollout/reward", "rollout/staleness", "time/train", "time/step", "eval/accuracy",
            "judge/grade", "agent/requests"} <= set(names)  # fmt: skip
    assert figures["train/loss"] == -0.1


def test_what_a_run_does_not_have_is_not_shown_as_zero() -> None:
    assert figures_of(StepMetrics(0, 1, 0.5)) == {"rollout/weight_version": 1, "eval/accuracy": 0.5}
    plain = figures_of(StepMetrics(1, 2, None, reward=0.0, loss=0.0))
    assert not [name for name in plain if name.startswith(("judge/", "agent/", "eval/"))]
    assert "time/judge" not in plain


@given(st.lists(st.booleans(), max_size=40))
def test_a_table_is_bounded_and_has_samples_from_the_whole_step(ended: list[bool]) -> None:
    rows = rows_of([sample(str(index), episode=one) for index, one in enumerate(ended)], CHAT)
    names = [str(index) for index, one in enumerate(ended) if one]
    shown = [row["sample"] for row in rows]
    assert len(shown) == min(MOST_ROWS, len(names)) == len(set(shown))
    assert set(shown) <= set(names)
    assert shown[:1] == names[:1]


def test_a_row_has_the_texts_and_cuts_long_ones_in_the_middle() -> None:
    [row] = rows_of([sample("s1", "a" * 9000 + "?")], CHAT)
    assert row["prompt"].startswith("user: aaa")
    assert row["prompt"].endswith("a?")
    assert "[5007 characters left out]" in row["prompt"]
    assert len(row["prompt"]) < LONGEST_TEXT + 50
    assert (row["answer"], row["end"], row["turns"]) == (CHAT.decode(CHAT.turn("#### 4")), "answered", 1)


def test_settings_have_no_keys() -> None:
    settings = {"engine": {"env": {"HF_TOKEN": "hf_1"}, "tp_size": 2}, "seed": 0}
    assert without_secrets(settings) == {"engine": {"env": {"HF_TOKEN": "***"}, "tp_size": 2}, "seed": 0}


def test_the_metrics_server_keeps_the_last_accuracy_and_adds_up_the_samples() -> None:
    first = training_view(FULL, None)
    assert (first.step, first.accuracy, first.loss, first.seconds["train"]) == (3, 0.5, -0.1, 1.5)
    assert first.rewards == FULL.rewards
    second = training_view(StepMetrics(**(asdict(FULL) | {"step": 4, "accuracy": None, "samples_failed": 2})), first)
    assert (second.step, second.accuracy) == (4, 0.5)
    assert (second.samples["finished"], second.samples["failed"]) == (32, 3)
