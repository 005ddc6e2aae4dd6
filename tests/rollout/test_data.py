"""Data sets in GSM8K's format: which lines are read, which are refused with which message, and the order over
epochs."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.models import FileDataConfig, GeneratedDataConfig, HubDataConfig
from millrace.errors import DataError
from millrace.rollout.data import load_problems, parse_answer, problems_at
from millrace.rollout.sample import Problem

# Two lines as GSM8K has them.
NATALIA = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
HOUSE = {"question": "How much is the house?", "answer": "It is $70,000*2 = $<<70000*2=140000>>140,000\n#### 140,000"}


def write_lines(path: Path, *lines: object) -> FileDataConfig:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return FileDataConfig(kind="file", path=path)


def test_reads_gsm8ks_own_lines(tmp_path: Path) -> None:
    problems = load_problems(write_lines(tmp_path / "train.jsonl", NATALIA, "", HOUSE))
    assert [problem.answer for problem in problems] == ["72", "140000"]
    assert problems[0].question == NATALIA["question"]
    assert len({problem.problem_id for problem in problems}) == 2


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 7", "7"), ("####7\n", "7"), ("#### 1,234,567", "1234567"), ("#### -5", "-5"), ("#### 2.50", "2.50"),
     ("#### $18", "18"), ("#### -$3", "-3"), ("#### .5", "0.5"), ("#### 3 is wrong\n#### 4", "4"),
     ("#### \u22125", "-5"), ("#### 3/4", "3/4"), ("#### 50%", "50"), ("#### \\boxed{1{,}234}", "1234")],
)  # fmt: skip
def test_answers(text: str, number: str) -> None:
    assert parse_answer(text) == number


@pytest.mark.parametrize("text", ["", "72", "#### ", "#### x", "#### 5 apples", "# 5", "#### -", "#### 1,5"])
def test_a_text_without_an_answer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="####"):
        parse_answer(text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"question": "Why?", "answer": "Because."}', "####"), ('{"question": "Why?"}', '"answer"'),
     ('{"answer": "#### 1"}', '"question"'), ('{"question": 4, "answer": "#### 1"}', '"question"'),
     ("[1, 2]", "JSON object"), ('{"question": "Why', "JSON|unexpected|EOF|string")],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    config = write_lines(tmp_path / "bad.jsonl", NATALIA, HOUSE, line)
    with pytest.raises(DataError, match=reason) as raised:
        load_problems(config)
    assert str(raised.value).startswith(f"{tmp_path / 'bad.jsonl'}, line 3: ")


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl can't be read: No such file"):
        load_problems(FileDataConfig(kind="file", path=tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="has no problems"):
        load_problems(write_lines(tmp_path / "empty.jsonl"))


def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "test.jsonl", NATALIA, HOUSE)
    path = str(tmp_path / "set")
    problems = load_problems(HubDataConfig(kind="hub", path=path, split="test"))
    assert [problem.answer for problem in problems] == ["72", "140000"]
    with pytest.raises(DataError, match="nosuch"):
        load_problems(HubDataConfig(kind="hub", path=path, split="nosuch"))
    write_lines(tmp_path / "set" / "test.jsonl", NATALIA, {"question": "Why?", "answer": "Because."})
    with pytest.raises(DataError, match=r"row 1: .*####"):
        load_problems(HubDataConfig(kind="hub", path=path, split="test"))


def test_the_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # Python marks a module that can't be imported like this
    with pytest.raises(DataError, match=r"millrace\[hub\]"):
        load_problems(HubDataConfig(kind="hub", path="openai/gsm8k", name="main", split="test"))


def test_the_two_sides_of_the_generator() -> None:
    config = GeneratedDataConfig(kind="generated", seed=3, problems=50)
    train, held_out = load_problems(config), load_problems(config, held_out=True)
    assert len(train) == len(held_out) == 50
    assert train == load_problems(config)
    assert {problem.question for problem in train}.isdisjoint(problem.question for problem in held_out)


@given(size=st.integers(1, 40), seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 30), max_size=8))
def test_the_order_goes_on_from_any_position(size: int, seed: int, cuts: list[int]) -> None:
    problems = [Problem(str(i), "?", "1") for i in range(size)]
    whole = problems_at(problems, seed, 0, sum(cuts))
    parts = [problems_at(problems, seed, sum(cuts[:i]), count) for i, count in enumerate(cuts)]
    assert whole == tuple(problem for part in parts for problem in part)


@given(size=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_has_each_problem_once(size: int, seed: int, epoch: int) -> None:
    problems = [Problem(str(i), "?", "1") for i in range(size)]
    assert sorted(p.problem_id for p in problems_at(problems, seed, epoch * size, size)) == sorted(
        p.problem_id for p in problems
    )


def test_epochs_and_seeds_differ_in_order() -> None:
    problems = [Problem(str(i), "?", "1") for i in range(50)]
    orders = {problems_at(problems, seed, epoch * 50, 50) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
