"""Data sets: which rows are read, which are refused with which message, and the order over epochs."""

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.sources import FileDataConfig, GeneratedDataConfig, HubDataConfig
from millrace.errors import DataError
from millrace.rollout.data import load_problems, problems_at
from millrace.rollout.reward import reference, require_number
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
    config = write_lines(tmp_path / "train.jsonl", NATALIA, "", HOUSE)
    problems = load_problems(config, check=require_number)
    assert [reference(problem.answer or "") for problem in problems] == ["72", "140,000"]
    assert problems[0].question == NATALIA["question"]
    assert [problem.row for problem in problems] == [NATALIA, HOUSE]
    assert [problem.problem_id for problem in problems] == ["train-1", "train-3"]


@pytest.mark.parametrize(
    "text",
    ["#### 7", "####7\n", "#### 1,234,567", "#### -5", "#### 2.50", "#### $18", "#### -$3", "#### .5",
     "#### 3 is wrong\n#### 4", "#### \u22125", "#### 3/4", "#### 50%", "#### \\boxed{1{,}234}", "72"],
)  # fmt: skip
def test_answers_that_the_rule_compares_with(text: str) -> None:
    require_number(Problem.of_question("p", "?", text))


@pytest.mark.parametrize("text", ["", "#### ", "#### x", "#### 5 apples", "# 5", "#### -", "#### 1,5", "Because."])
def test_an_answer_without_a_number_is_refused_by_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="####"):
        require_number(Problem.of_question("p", "?", text))


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_lines(path, *rows)


ROWS = [{"task": "Say \"hi\",\n  then\u2028stop", "solution": "hi", "level": "1"},
        {"task": "Count", "solution": "1", "level": "2"}]  # fmt: skip


@pytest.mark.parametrize(("suffix", "write"), [("csv", write_csv), ("jsonl", write_jsonl), ("parquet", write_parquet)])
def test_every_kind_of_file_gives_the_same_problems(
    suffix: str, write: Callable[[Path, Sequence[Mapping[str, Any]]], None], tmp_path: Path
) -> None:
    write(tmp_path / f"own.{suffix}", ROWS)
    config = FileDataConfig(
        kind="file", path=tmp_path / f"own.{suffix}", prompt="task", answer="solution", system_prompt="Be brief."
    )
    problems = load_problems(config)
    assert [problem.problem_id for problem in problems] == ["own-1", "own-2"]
    assert [problem.row for problem in problems] == ROWS
    assert [problem.answer for problem in problems] == ["hi", "1"]
    for problem, row in zip(problems, ROWS, strict=True):
        assert problem.messages == (TALK[0], {"role": "user", "content": row["task"]})
        assert problem.question == row["task"]


def test_prompts_may_be_chat_messages(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    used = [*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    problems = load_problems(write_lines(tmp_path / "talk.jsonl", {"messages": TALK}, {"messages": used}))
    assert problems[0].messages == tuple(TALK)
    assert problems[1].messages == (*TALK, {"role": "assistant", "content": "", "tool_calls": [call]}, used[-1])
    assert [(problem.question, problem.answer) for problem in problems] == [("How many?", None)] * 2

    # A table has every key in every message, and None where the message has none.
    write_parquet(tmp_path / "talk.parquet", [{"prompt": [{**message, "name": None} for message in TALK]}])
    [problem] = load_problems(FileDataConfig(kind="file", path=tmp_path / "talk.parquet"))
    assert problem.messages == tuple(TALK)


def test_the_first_column_that_can_be_a_prompt_is_taken(tmp_path: Path) -> None:
    row = {"messages": TALK, "prompt": "the prompt", "question": "the question", "answer": 7.5}
    config = write_lines(tmp_path / "rows.jsonl", row)
    [problem] = load_problems(config)
    assert (problem.question, problem.answer) == ("the question", "7.5")
    [problem] = load_problems(config.model_copy(update={"prompt": "prompt"}))
    assert problem.question == "the prompt"


def test_rows_without_prompts_keep_their_system_prompt(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "seeds.jsonl", {"seed": 1})
    [problem] = load_problems(config.model_copy(update={"system_prompt": "Play."}), prompts=False)
    assert (problem.messages, problem.question) == (({"role": "system", "content": "Play."},), "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"question": "Why?", "answer": "Because."}', "####"), ('{"question": "Why?"}', 'no column "answer"; it has'),
     ('{"answer": "#### 1"}', 'no column "question"'), ('{"question": 4, "answer": "#### 1"}', '"question" is 4;'),
     ('{"question": "Why?", "answer": true}', '"answer" is True; an answer is a text or a number'),
     ('{"question": " ", "answer": "1"}', '"question" is empty'), ('{"question": [], "answer": "1"}', r"is \[\];"),
     ("[1, 2]", "JSON object"), ('{"question": "Why', "JSON|unexpected|EOF|string"),
     ('{"question": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "answer": "1"}',
      'last message of the column "question" has the role assistant'),
     ('{"question": [{"role": "person", "content": "?"}], "answer": "1"}', 'message 0 of the column "question" is'),
     ('{"question": [{"role": "user", "content": 4}], "answer": "1"}', "has the content 4; it must be text, or a list"),
     ('{"question": [{"role": "user", "content": [{"text": "?"}]}], "answer": "1"}', "has the content part {'text'")],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    config = write_lines(tmp_path / "bad.jsonl", NATALIA, HOUSE, line)
    with pytest.raises(DataError, match=reason) as raised:
        load_problems(config, check=require_number)
    assert str(raised.value).startswith(f"{tmp_path / 'bad.jsonl'}, line 3: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "row", "reason"),
    [
        ({}, {"text": "?"}, 'line 1: it has no column "question", "prompt" or "messages"; .*It has: text'),
        ({"prompt": "task"}, {"question": "?"}, 'line 1: it has no column "task"; it has: question'),
        ({"answer": "gold"}, {"question": "?"}, 'line 1: it has no column "gold"'),
        ({"system_prompt": "Hi"}, {"messages": TALK}, "begins with a system message, and `system_prompt:` is set too"),
    ],
)
def test_settings_that_do_not_fit_the_rows(
    tmp_path: Path, settings: Mapping[str, str], row: Mapping[str, object], reason: str
) -> None:
    config = write_lines(tmp_path / "rows.jsonl", row).model_copy(update=settings)
    with pytest.raises(DataError, match=reason):
        load_problems(config)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.txt", b"", r"rows.txt must be \.jsonl, \.csv, \.parquet"),
        ("rows.csv", b"question,answer\nWhy?\n", r"row 1 \(line 2\): it has another number of values than the header"),
        ("rows.csv", b"question\n\xff\n", "byte 0xff is not UTF-8"),
        ("rows.csv", b'question\n"Why?\n', "it is not CSV"),
        ("rows.parquet", b"question", "rows.parquet is not Parquet"),
        ("rows.jsonl", b'{"question": "\xff"}', "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_problems(FileDataConfig(kind="file", path=tmp_path / name))


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
    assert [problem.answer for problem in problems] == [NATALIA["answer"], HOUSE["answer"]]
    with pytest.raises(DataError, match="nosuch"):
        load_problems(HubDataConfig(kind="hub", path=path, split="nosuch"))
    write_lines(tmp_path / "set" / "test.jsonl", NATALIA, {"question": "Why?", "answer": "Because."})
    with pytest.raises(DataError, match=r"row 1: .*####"):
        load_problems(HubDataConfig(kind="hub", path=path, split="test"), check=require_number)


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
    problems = [Problem.of_question(str(i), "?", "1") for i in range(size)]
    whole = problems_at(problems, seed, 0, sum(cuts))
    parts = [problems_at(problems, seed, sum(cuts[:i]), count) for i, count in enumerate(cuts)]
    assert whole == tuple(problem for part in parts for problem in part)


@given(size=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_has_each_problem_once(size: int, seed: int, epoch: int) -> None:
    problems = [Problem.of_question(str(i), "?", "1") for i in range(size)]
    assert sorted(p.problem_id for p in problems_at(problems, seed, epoch * size, size)) == sorted(
        p.problem_id for p in problems
    )


def test_epochs_and_seeds_differ_in_order() -> None:
    problems = [Problem.of_question(str(i), "?", "1") for i in range(50)]
    orders = {problems_at(problems, seed, epoch * 50, 50) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
