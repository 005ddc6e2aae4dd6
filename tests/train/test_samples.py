"""The samples of a run in Parquet: what is in the columns, who can read them, and that no file is ever torn."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from pyarrow import parquet

from millrace.config import load_config
from millrace.errors import DataError
from millrace.rollout.chat import ChatFormat, check_chat_format
from millrace.rollout.sample import Episode, EpisodeEnd, Group, Message, Problem, Sample, SampleStatus
from millrace.rollout.timings import Timings
from millrace.rollout.tools import Calculator, ToolAnswer
from millrace.train.batch import sequences_of
from millrace.train.record import RunFolder
from millrace.train.sample_files import read_samples
from millrace.train.samples import SCHEMA, SampleFormat, Trained, conversation_json, trained_samples
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import VersionSpan
from tests.config.test_loading import VALID

PROBLEM = Problem.of_question("p-1", "What is 6 x 7? 你好 👩", "42")
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 x 7"}}\n</tool_call>'
COLUMNS = """\
step int32, sample string, group string, problem string, answer string, status string, reason string, end string,
reward double, rewards map<string, double>, advantage double, turns int32, tool_calls int32, tool_errors int32,
prompt_tokens int32, tokens int32, oldest_version int32, newest_version int32, gap double, started_at double,
seconds double, timings map<string, double>, messages string, counts map<string, int32>, images list<item: string>"""
SEQUENCES = """\
list<item: struct<end: string, turns: int32, text: string, ends: list<item: int32>, token_ids: list<item: int32>,
loss_mask: list<item: bool>, logprobs: list<item: float>, trainer_logprobs: list<item: float>,
version_spans: list<item: struct<version: int32, start: int32, end: int32>>>>"""


def chat_format() -> ChatFormat:
    return check_chat_format(make_tiny_tokenizer(), "tiny", [Calculator().schema])


CHAT = chat_format()


def episode(parts: Sequence[tuple[str, bool]], messages: tuple[Message, ...], version: int | None = 3) -> Episode:
    """An episode whose sampled parts are True, with logprobs of -1, -2, -3 and so on."""
    ids: list[int] = []
    mask: list[bool] = []
    spans = []
    for text, sampled in parts:
        encoded = CHAT.tokenizer.encode(text, add_special_tokens=False)
        if sampled:
            spans.append(VersionSpan(version, len(ids), len(ids) + len(encoded)))
        ids += encoded
        mask += [sampled] * len(encoded)
    loss_mask = np.array(mask)
    logprobs = np.where(loss_mask, -np.cumsum(loss_mask), 0).astype(np.float32)
    turns = sum(sampled for _, sampled in parts)
    return Episode(tuple(ids), loss_mask, logprobs, tuple(spans), turns, EpisodeEnd.ANSWERED, messages)


def played(name: str, reward: float) -> Sample:
    bad = ToolAnswer("calculator", "Error: 6 x 7", failed=True).message
    turns: tuple[Message, ...] = (
        {"role": "assistant", "content": CALL},
        bad,
        {"role": "assistant", "content": "#### 42"},
    )
    branch = episode([("<|im_start|>you\n", False), ("Ja 👩.", True)], (), version=1)
    main = episode(
        [(f"{PROBLEM.question}\n", False), (CALL, True), ("<tool_response>", False), ("#### 42", True)], turns
    )
    timings = Timings(1000.5, 2.5, {"queue": 0.5, "generate": 1.5, "tools": 0.25})
    return Sample(
        name, "g-0", PROBLEM, SampleStatus.FINISHED, main, reward, rewards={"right": reward}, branches=(branch,),
        counts={"requests": 3}, timings=timings,
    )  # fmt: skip


def folder_in(path: Path) -> RunFolder:
    (path / "run.yaml").write_text(VALID)
    return RunFolder(load_config(path / "run.yaml", [f"output_dir={path}", "name=run"]), resume=False)


def written(path: Path) -> tuple[list[Sample], dict[str, Trained], list[dict[str, Any]]]:
    """Two samples that were trained, one that failed and one that was aborted, as written and as read."""
    samples = [played("g-0-0", 1.0), played("g-0-1", 0.0)]
    group = Group("g-0", PROBLEM, tuple(samples))
    sequences = sequences_of(group, normalize=False)
    logprobs = [np.where(one.loss_mask, one.logprobs + 0.25, 0).astype(np.float32) for one in sequences]
    trained = trained_samples([group], sequences, logprobs)
    reason = "no file \udce4.txt"  # as Python reads a name that is no UTF-8
    samples.append(Sample("g-0-2", "g-0", PROBLEM, SampleStatus.FAILED, None, 0.0, reason))
    samples.append(Sample("g-0-3", "g-0", PROBLEM, SampleStatus.ABORTED, None, 0.0, "cancelled: too old"))
    folder = folder_in(path)
    with folder.create():
        folder.add_samples(7, samples, trained, SampleFormat(CHAT))
    return samples, trained, list(read_samples(folder.path))


def test_the_columns_are_those_that_readers_know() -> None:
    named = ", ".join(f"{field.name} {field.type}" for field in SCHEMA if field.name != "sequences")
    assert named == COLUMNS.replace("\n", " ")
    assert str(SCHEMA.field("sequences").type) == SEQUENCES.replace("\n", " ")


def test_a_trained_sample_has_its_tokens_its_conversation_and_what_the_trainer_made_of_it(tmp_path: Path) -> None:
    [sample, *_], trained, rows = written(tmp_path)
    row = rows[0]
    assert sample.episode is not None
    assert (row["step"], row["sample"], row["group"], row["problem"], row["answer"]) == (7, "g-0-0", "g-0", "p-1", "42")
    assert (row["status"], row["reason"], row["end"]) == ("finished", None, "answered")
    assert (row["reward"], row["rewards"], row["counts"]) == (1.0, {"right": 1.0}, {"requests": 3})
    assert [one["advantage"] for one in rows] == [0.5, -0.5, None, None]
    assert row["gap"] == pytest.approx(0.25)
    assert (row["turns"], row["tool_calls"], row["tool_errors"]) == (3, 1, 1)
    assert (row["oldest_version"], row["newest_version"]) == (1, 3)
    assert row["tokens"] == sample.generated_tokens
    assert row["prompt_tokens"] == int(np.flatnonzero(sample.episode.loss_mask)[0])
    assert (row["started_at"], row["seconds"]) == (1000.5, 2.5)
    assert row["timings"] == {"queue": 0.5, "generate": 1.5, "tools": 0.25}
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert [message.get("error") for message in row["messages"]] == [None, None, True, None]
    assert len(row["sequences"]) == 2
    for one, made, logprobs in zip(row["sequences"], sample.sequences, trained["g-0-0"].logprobs, strict=True):
        assert one["token_ids"] == list(made.token_ids)
        assert one["loss_mask"] == made.loss_mask.tolist()
        assert one["logprobs"] == made.logprobs.tolist()
        assert one["trainer_logprobs"] == logprobs.tolist()
        assert one["text"] == CHAT.decode(made.token_ids)
        assert one["version_spans"] == [
            {"version": s.version, "start": s.start, "end": s.end} for s in made.version_spans
        ]
        pieces = [one["text"][start:end] for start, end in zip([0, *one["ends"]], one["ends"], strict=False)]
        assert "".join(pieces) == one["text"]
        assert "👩" in "".join(pieces) if made is sample.branches[0] else "你好" in "".join(pieces)
        assert (one["end"], one["turns"]) == ("answered", made.turns)
    assert row["sequences"][-1]["text"].endswith("#### 42")


def test_a_sample_without_an_episode_has_its_prompt_and_its_reason(tmp_path: Path) -> None:
    _, _, [*_, failed, aborted] = written(tmp_path)
    assert (failed["status"], failed["reason"]) == ("failed", "no file ?.txt")
    assert (aborted["status"], aborted["reason"]) == ("aborted", "cancelled: too old")
    for row in (failed, aborted):
        assert row["messages"] == [{"role": "user", "content": PROBLEM.question}]
        assert (row["sequences"], row["images"], row["rewards"]) == ([], [], {})
        assert (row["end"], row["advantage"], row["gap"], row["oldest_version"]) == (None, None, None, None)


def test_duckdb_reads_them(tmp_path: Path) -> None:
    written(tmp_path)
    files = f"'{tmp_path}/run/samples/*.parquet'"

    def rows(query: str) -> list[Any]:
        with duckdb.connect() as connection:
            return connection.execute(query).fetchall()

    [[reward, sampled, error]] = rows(
        "SELECT rewards['right'], list_sum(sequences[-1].loss_mask::INT[]), "
        f"json_extract(messages, '$[2].error')::BOOL FROM {files} WHERE sample = 'g-0-0'"
    )
    assert (reward, error) == (1.0, True)
    assert sampled == sum(played("", 1.0).sequences[-1].loss_mask)
    counted = rows(f"SELECT status, count(*) FROM {files} GROUP BY 1 ORDER BY 1")
    assert counted == [("aborted", 1), ("failed", 1), ("finished", 2)]


def test_a_conversation_is_json_whatever_is_in_it() -> None:
    image, text = {"type": "image", "image": b"\xff"}, {"type": "text", "text": "ü\ud800"}

    def call(where: object) -> Message:
        return {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"n": 2**70, "where": where}}]}

    odd: list[Message] = [{"role": "user", "content": [image, text]}, call(Path("x"))]
    shown = [{"role": "user", "content": [{"type": "image"}, text]}, call("x")]
    assert json.loads(conversation_json(odd)) == shown


def test_a_run_without_samples_and_a_damaged_file_are_errors_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run/samples has no samples"):
        list(read_samples(tmp_path / "run"))
    written(tmp_path)
    file = tmp_path / "run" / "samples" / "step-000007.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"step-000007.parquet can't be read: .*") as raised:
        list(read_samples(tmp_path / "run"))
    assert "\n" not in str(raised.value)


def test_a_disk_that_refuses_is_an_error_with_the_path(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    with folder.create():
        (folder.path / "samples").touch()
        with pytest.raises(DataError, match=r"run/samples/step-000001.parquet can't be written: "):
            folder.add_samples(1, [played("s", 1.0)], {}, SampleFormat(CHAT))


WRITES = """
import itertools, sys
from pathlib import Path
from tests.train.test_samples import CHAT, folder_in, played
from millrace.train.samples import SampleFormat
folder, form = folder_in(Path(sys.argv[1])), SampleFormat(CHAT)
with folder.create():
    for step in itertools.count(1):
        folder.add_samples(step, [played(f"{step}-{i}", 1.0) for i in range(20)], {}, form)
"""


def test_a_writer_that_is_killed_leaves_no_torn_file(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)])
    samples, end = tmp_path / "run" / "samples", time.monotonic() + 60
    while not (samples / "step-000005.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    files = list(samples.glob("*.parquet"))
    assert [parquet.read_metadata(file).num_rows for file in files] == [20] * len(files)
    assert len(list(read_samples(tmp_path / "run"))) == 20 * len(files) >= 100
