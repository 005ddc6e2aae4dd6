"""The records of runs, read as they grow."""

import itertools
import json
import time
from pathlib import Path

import pytest

from millrace.errors import ConfigError
from millrace.viewer import runs as module
from millrace.viewer.following import Follower
from millrace.viewer.runs import Columns, RunFiles, find_runs
from millrace.viewer.timeline import Span, Timeline, coarser, joined
from tests.viewer.runs import Writer


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "deep/b", "deep/er/c"):
        Writer(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert list(find_runs(tmp_path)) == ["a", "deep/b", "deep/er/c"]
    assert list(find_runs(tmp_path / "a")) == ["a"]
    with pytest.raises(ConfigError, match="there is no run at or below"):
        find_runs(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is not a folder"):
        find_runs(tmp_path / "none")


def test_a_file_is_read_from_where_the_last_reading_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == (False, [])
    path.write_text('{"step": 1}\n{"st')
    assert follower.read() == (False, [{"step": 1}])
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert follower.read() == (False, [{"step": 2}])
    assert follower.read() == (False, [])


def test_broken_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n\0\0\n[1]\n\xff\xfe\n{"step": 2}\n')
    follower = Follower(path)
    assert follower.read() == (False, [{"step": 1}, {"step": 2}])
    assert follower.trouble == "metrics.jsonl: 3 lines could not be read and were left out, the first is line 2"


def test_a_file_that_was_replaced_or_cut_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    follower = Follower(path)
    follower.read()
    beside = tmp_path / "beside"
    beside.write_text('{"step": 1}\n{"step": 2, "reward": 0.5}\n')
    beside.replace(path)
    assert follower.read() == (True, [{"step": 1}, {"step": 2, "reward": 0.5}])
    path.write_text('{"step": 1}\n')
    assert follower.read() == (True, [{"step": 1}])
    path.unlink()
    assert follower.read() == (True, [])
    assert follower.read() == (False, [])


def test_large_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.viewer.following.LARGEST_READ", 100)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(500)))
    run = RunFiles("run", tmp_path)
    run.refresh(events=True)
    assert run.metrics.values["step"] == list(range(500))


def test_metrics_come_as_columns_after_what_is_known(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    run = RunFiles("run", writer.folder)
    run.refresh(events=True)
    first = run.metrics_after(0, 0)
    assert (first["count"], first["columns"]["accuracy"]) == (1, [0.19])
    writer.steps(2)
    run.refresh(events=True)
    more = run.metrics_after(first["epoch"], first["count"])
    assert (more["start"], more["columns"]["step"]) == (1, [1, 2])
    assert len(more["columns"]["rewards.correct"]) == 2
    assert more["columns"]["accuracy"] == [None, None]
    lines = (writer.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (writer.folder / "metrics.jsonl").write_text("".join(lines[:2]))  # resumed after step 1
    run.refresh(events=True)
    again = run.metrics_after(first["epoch"], 3)
    assert (again["epoch"], again["start"], again["columns"]["step"]) == (1, 0, [0, 1])


def test_a_long_run_comes_as_an_outline_and_then_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 40)
    monkeypatch.setattr(module, "SKETCHED", 10)
    records = [{"step": n, "loss": n / 2, **({"accuracy": n} if n % 7 == 0 else {})} for n in range(1, 104)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run = RunFiles("run", tmp_path)
    run.refresh()
    first = run.metrics_after(0, 0)
    assert (first["count"], first["total"], first["columns"]) == (0, 103, {})
    assert first["sketch"]["step"] == [11, 22, 33, 44, 55, 66, 77, 88, 99, 103]
    assert first["sketch"]["loss"] == [step / 2 for step in first["sketch"]["step"]]
    assert first["sketch"]["accuracy"] == [7, 21, 28, 42, 49, 63, 77, 84, 98, 98]  # the last of each eleven steps
    parts: list[list[int]] = []
    count = 0
    while count < 103:
        answer = run.metrics_after(0, count, sketched=103)
        assert answer["start"] == count
        parts.append(answer["columns"]["step"])
        count = answer["count"]
    assert [len(part) for part in parts] == [40, 40, 23]
    assert [*itertools.chain(*parts)] == list(range(1, 104))
    assert "sketch" in run.metrics_after(0, 0, sketched=50)  # the run has grown since
    assert "sketch" in run.metrics_after(7, 0, sketched=103)  # an outline of another epoch


def test_the_records_of_a_long_run_are_read_in_time_that_grows_with_their_number() -> None:
    def seconds(count: int) -> float:
        columns, record = Columns(), {f"figure {n}": 1.0 for n in range(20)}
        begun = time.thread_time()
        for step in range(count):
            columns.add({"step": step, **record})
        return time.thread_time() - begun

    assert min(seconds(8000) for _ in range(3)) < 16 * min(seconds(1000) for _ in range(3))  # 8, were it not for noise


def test_before_the_first_step_there_are_no_figures_of_training() -> None:
    columns = Columns()
    idle = {"weight_version": 1, "tokens_per_second": 0.0, "samples_finished": 0, "kl": None}
    columns.add({"step": 0, "reward": None, "accuracy": 0.0, **idle})
    columns.add({"step": 1, "reward": 0.0, "accuracy": None, **idle})
    assert columns.values["accuracy"] == [0.0, None]
    assert columns.values["weight_version"] == [1, 1]
    assert columns.values["tokens_per_second"] == columns.values["samples_finished"] == [None, 0]
    other = Columns()  # of a trainer of the user's own
    other.add({"step": 0, "loss": 0.0})
    assert other.values["loss"] == [0.0]


def test_a_run_says_what_is_wrong_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    (tmp_path / "events.jsonl").write_text("x\n")
    (tmp_path / "advice.jsonl").mkdir()
    run = RunFiles("run", tmp_path)
    run.refresh(events=True)
    assert sorted(run.troubles()) == [
        "advice.jsonl can't be read: Is a directory",
        "events.jsonl: 1 line could not be read and were left out, the first is line 1",
        "the run was written by another version of Millrace: its samples.jsonl can't be shown",
    ]
    assert run.summary()["step"] == 0


def test_the_timeline_says_what_each_engine_did(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.steps(6)
    run = RunFiles("run", writer.folder)
    run.refresh(events=True)
    shown = run.lanes(None, None)
    assert [lane["engine"] for lane in shown["lanes"]] == ["sglang-0", "sglang-1", "sglang-2"]
    kinds = {span[0] for span in shown["lanes"][1]["spans"]}
    assert kinds == {"loading", "ready", "asleep", "dead"}
    for lane in shown["lanes"]:
        times = [time for _, start, end, _ in lane["spans"] for time in (start, end)]
        assert times == sorted(times)
        assert [publish["version"] for publish in lane["publishes"]] == [2, 3, 4, 5, 6, 7]
    fleet = run.fleet()
    assert [engine["restarts"] for engine in fleet["engines"]] == [0, 1, 0]
    assert {engine["version"] for engine in fleet["engines"]} == {7}
    assert {engine["lag"] for engine in fleet["engines"]} == {0}
    assert "request" not in {event["kind"] for event in fleet["events"]}


def test_the_requests_of_all_ranks_keep_an_engine_busy(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    request = {"kind": "request", "engine": "sglang-0", "outcome": "finished", "seconds": 1.0}
    for name, ends in (
        ("events.jsonl", (100.0, 120.0)),
        ("events-1.jsonl", (100.5, 110.0)),
        ("events-12.jsonl", (115.0,)),
    ):
        for at in ends:
            writer.line(name, {"at": at, **request})
    writer.line("events-1.jsonl", {"at": 130.0, "kind": "member", "engine": "sglang-9", "state": "ready"})
    run = RunFiles("run", writer.folder)
    run.refresh(events=True)
    [lane] = [lane for lane in run.lanes(0.0, 1000.0)["lanes"] if lane["engine"] == "sglang-0"]
    assert lane["busy"] == [[99.0, 100.5], [109.0, 110.0], [114.0, 115.0], [119.0, 120.0]]
    assert "sglang-9" not in {engine["name"] for engine in run.fleet()["engines"]}
    lines = (writer.folder / "events-1.jsonl").read_text().splitlines(keepends=True)
    (writer.folder / "events-1.jsonl").write_text("".join(lines[:1]))  # a torn end was dropped
    run.refresh(events=True)
    run.refresh(events=True)
    [engine] = [engine for engine in run.fleet()["engines"] if engine["name"] == "sglang-0"]
    assert engine["requests"] == 4


def test_many_equal_events_do_not_hide_the_one_before(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.member("sglang-1", "dead", "ready", None, reason="killed")
    for _ in range(300):
        writer.clock += 0.01
        writer.event("retry", "sglang-1", attempt=1, continued=True)
    writer.event("retry", "sglang-1", attempt=2, continued=True)
    run = RunFiles("run", writer.folder)
    run.refresh(events=True)
    dead, first, second = run.fleet()["events"][-3:]
    assert (dead["state"], first["attempt"], first["times"], second["attempt"]) == ("dead", 1, 300, 2)
    assert "times" not in second
    assert dead["at"] < first["at"] <= second["at"]


def test_events_that_are_not_understood_are_left_out() -> None:
    line = Timeline()
    line.add([
        {"at": "now", "kind": "member", "engine": "a"}, {"at": 1.0, "kind": "member", "engine": "a"},
        {"at": 2.0, "kind": "publish"}, {"at": 3.0, "kind": "request", "engine": "a", "outcome": "finished"},
        {"at": 4.0, "kind": "unheard of", "engine": "a"},
    ])  # fmt: skip
    assert (line.first, line.last) == (4.0, 4.0)


@pytest.mark.parametrize("killed", [False, True])
def test_between_two_processes_an_engine_does_not_run(killed: bool) -> None:
    line = Timeline()
    member = {"kind": "member", "engine": "a", "was": None, "version": 1, "asleep": None, "reason": None}
    line.add([
        {"at": 0.5, "kind": "opened", "engine": None},
        {**member, "at": 1.0, "state": "starting"}, {**member, "at": 2.0, "state": "ready", "was": "starting"},
        {"at": 5.0, "kind": "restart", "engine": "a"},
        *([] if killed else [{"at": 5.0, "kind": "closed", "engine": None, "reason": None}]),
        {"at": 899.0, "kind": "opened", "engine": None}, {**member, "at": 900.0, "state": "starting"},
        {**member, "at": 910.0, "state": "ready", "was": "starting"}, {"at": 920.0, "kind": "closed", "engine": None},
    ])  # fmt: skip
    spans = line.window(0, 1000)[0]["spans"]
    assert [(kind, start, end) for kind, start, end, _ in spans] == [
        ("loading", 1.0, 2.0), ("ready", 2.0, 5.0), ("gone", 5.0, 900.0), ("loading", 900.0, 910.0),
        ("ready", 910.0, 920.0), ("gone", 920.0, 920.0),
    ]  # fmt: skip
    assert [engine["state"] for engine in line.table()] == ["gone"]


def test_a_run_says_that_it_has_ended_until_it_is_resumed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.steps(2)
    run = RunFiles("run", writer.folder)
    assert run.summary()["ended"] is None
    writer.closed()
    assert run.summary()["ended"] == {"at": pytest.approx(writer.clock, abs=1e-3), "reason": None}
    writer.clock += 100
    writer.opened()
    assert run.summary()["ended"] is None
    writer.closed("no engine is left")
    assert run.summary()["ended"]["reason"] == "no engine is left"
    with (writer.folder / "events.jsonl").open("a") as file:
        file.write('{"at": 1.0, "kind": "clo')
    assert run.summary()["ended"] is None
    run.refresh(events=True)
    assert {engine["state"] for engine in run.fleet()["engines"]} == {"gone"}


def test_a_time_in_which_an_engine_was_not_in_the_fleet_stays_empty_far_out() -> None:
    spans = [Span("loading", 0.0, 1.0), Span("ready", 1.0, 2.0), Span("loading", 900.0, 901.0), Span("ready", 901, 902)]
    bars = coarser(spans, 10.0, 1000)
    assert [(start, end) for _, start, end, _ in bars] == [(0.0, 2.0), (900.0, 902)]


def test_many_spans_are_drawn_together_and_a_death_stays() -> None:
    line = Timeline()
    for step in range(5000):
        for state, asleep in (("ready", None), ("dead" if step == 2500 else "ready", "weights")):
            line.add([{
                "at": step + (asleep is not None) / 2, "kind": "member", "engine": "a", "state": state, "was": "x",
                "asleep": asleep,
            }])  # fmt: skip
    spans = line.window(0, 5000, bars=100)[0]["spans"]
    assert len(spans) < 250
    assert "dead" in {kind for kind, *_ in spans}
    assert len(coarser(line.lanes["a"].spans, 0.0, 5000)) == 10_000


def test_overlapping_requests_are_one_interval() -> None:
    line = Timeline()
    for at, seconds in ((1.0, 0.5), (1.2, 1.0), (3.0, 0.1), (9.0, 8.9)):
        line.add([{"at": at, "kind": "request", "engine": "a", "outcome": "finished", "seconds": seconds}])
    assert line.lanes["a"].busy == [[pytest.approx(0.1), 9.0]]
    assert joined([[0, 1], [1.5, 2], [5, 6]], 0.6) == [[0, 2], [5, 6]]
