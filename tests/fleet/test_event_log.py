"""The events that an event log counts and writes, and the errors that it survives. tests/serve/test_metrics.py tests it
with whole fleets."""

import asyncio
import itertools
import socket
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.engines import EmbeddedEngineConfig
from millrace.errors import (
    DataError,
    EngineError,
    EngineFailed,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    LaunchError,
    NoEngineError,
    PublishError,
)
from millrace.fleet.event_log import REMEMBERED, REQUEST_BOUNDS, EventLog, Outcome, Spans
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Attested, Died, Event, Phase, ReplicaState, Slept, Woke, after
from millrace.http.serving import serving
from millrace.launch.ports import url_of
from millrace.serve.server import bind
from millrace.types import FinishReason, Generation
from millrace.weights.report import EngineReport, PublishReport


def lines(path: Path) -> list[dict[str, object]]:
    """The events of a log, without its first and its last."""
    records: list[dict[str, object]] = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return [record for record in records if record["kind"] not in ("opened", "closed")]


def generation(reason: FinishReason = FinishReason.STOP) -> Generation:
    return Generation("r", (1, 2, 3), np.zeros(3, np.float32), reason, (), prompt_tokens=10, cached_tokens=4)


def ask(event_log: EventLog, outcome: FinishReason | BaseException) -> None:
    with event_log.request("e0") as asked:
        if isinstance(outcome, BaseException):
            raise outcome
        asked.made = generation(outcome)


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (FinishReason.STOP, Outcome.FINISHED),
        (FinishReason.LENGTH, Outcome.FINISHED),
        (FinishReason.ABORT, Outcome.ABORTED),
        (asyncio.CancelledError(), Outcome.ABORTED),
        (EngineRefused("e0", "the prompt is SECRET"), Outcome.REFUSED),
        (EngineTimeout("e0", "late"), Outcome.TIMEOUT),
        (TimeoutError(), Outcome.TIMEOUT),
        (EngineFailed("e0", "the prompt is SECRET"), Outcome.FAILED),
        (EngineUnreachable("e0", "gone", sent=True), Outcome.FAILED),
        (ValueError("SECRET"), Outcome.FAILED),
    ],
    ids=str,
)
def test_each_request_ends_in_one_way_and_no_message_that_may_quote_it_is_written(
    tmp_path: Path, end: FinishReason | BaseException, outcome: Outcome
) -> None:
    with EventLog(tmp_path / "events.jsonl") as event_log:
        with pytest.raises(type(end)) if isinstance(end, BaseException) else nullcontext():
            ask(event_log, end)
        assert event_log.metrics.requests == {("e0", outcome): 1}
        routine = outcome in (Outcome.FINISHED, Outcome.ABORTED)
        assert len(event_log.newest) == (0 if routine else 1)
    [line] = lines(tmp_path / "events.jsonl")
    assert (line["kind"], line["engine"], line["outcome"]) == ("request", "e0", outcome)
    assert isinstance(line["at"], float)
    assert "SECRET" not in (tmp_path / "events.jsonl").read_text()
    if isinstance(end, FinishReason):
        assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (10, 4, 3)
        assert event_log.metrics.cache_hit_share("e0") == 0.4
    else:
        assert line["error"] == type(end).__name__
        assert event_log.metrics.cache_hit_share("e0") is None


def test_a_request_that_no_engine_could_take_is_counted_and_one_that_found_one_is_not() -> None:
    event_log = EventLog()
    with event_log.waiting():
        pass
    assert not event_log.metrics.requests
    with pytest.raises(NoEngineError), event_log.waiting():
        raise NoEngineError("none")
    assert event_log.metrics.requests == {("", Outcome.UNSERVED): 1}


EVENTS = st.lists(st.sampled_from([Attested(1), Attested(2), Slept(), Died("killed")]), max_size=8)


@given(EVENTS)
def test_every_state_that_a_replica_comes_into_is_counted_and_remembered_once(events: list[Event]) -> None:
    event_log, state = EventLog(), ReplicaState("e0", "http://e0")
    states = [state]
    event_log.changed(None, state)
    for event in events:
        states.append(after(states[-1], event))
        event_log.changed(states[-2], states[-1])
    moved = [s.phase for before, s in itertools.pairwise(states) if s.phase is not before.phase]
    for phase in Phase:
        assert event_log.metrics.entered["e0", phase] == [states[0].phase, *moved].count(phase)
    assert [e.fields["state"] for e in event_log.newest] == [states[0].phase, *moved]
    assert event_log.metrics.newest == max((s.version for s in states if s.version is not None), default=None)


async def test_the_start_of_an_engine_is_recorded_when_it_begins(tiny_model: Path, tmp_path: Path) -> None:
    asked_at = asyncio.get_running_loop().create_future()

    async def never(_: web.Request) -> web.Response:
        asked_at.set_result(time.time())
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", never)
    with bind("127.0.0.1", 0, "an engine", "--port") as sock, EventLog(tmp_path / "events.jsonl") as event_log:
        async with serving(app, sock, cancel=True):
            config = EmbeddedEngineConfig(kind="embedded", urls=(url_of(*sock.getsockname()[:2]),))
            opening = asyncio.create_task(open_nothing(config, tiny_model, tmp_path, event_log))
            async with asyncio.timeout(60):
                await asyncio.wait([opening, asked_at], return_when=asyncio.FIRST_COMPLETED)
            [started] = lines(tmp_path / "events.jsonl")  # the engine has not answered yet
            assert (started["engine"], started["state"], started["was"]) == ("embedded-0", "starting", None)
            assert isinstance(started["at"], float)
            assert started["at"] <= asked_at.result() + 0.001
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)


async def open_nothing(config: EmbeddedEngineConfig, model: Path, folder: Path, event_log: EventLog) -> None:
    async with open_fleet(config, model, log_dir=folder, event_log=event_log):
        pass


async def test_an_engine_has_one_start_in_the_log(tiny_model: Path, tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as event_log:
        await open_nothing(EmbeddedEngineConfig(kind="embedded", threads=1), tiny_model, tmp_path, event_log)
        assert event_log.metrics.entered["embedded-0", Phase.STARTING] == 1
    told = [line for line in lines(tmp_path / "events.jsonl") if line["kind"] == "member"]
    assert [(line["state"], line["was"]) for line in told] == [("starting", None), ("ready", "starting")]


async def test_an_engine_whose_start_fails_is_recorded_as_dead(tiny_model: Path, tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as event_log, socket.create_server(("127.0.0.1", 0)) as taken:
        config = EmbeddedEngineConfig(kind="embedded", ports=(taken.getsockname()[1],))
        with pytest.raises(LaunchError):
            await open_nothing(config, tiny_model, tmp_path, event_log)
    started, dead = lines(tmp_path / "events.jsonl")
    assert (started["state"], dead["state"], dead["was"]) == ("starting", "dead", "starting")
    assert "already in use" in str(dead["reason"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, None),
        (KeyboardInterrupt(), "interrupted"),
        (asyncio.CancelledError(), "interrupted"),
        (NoEngineError("no engine is left: e0 (dead)\nand more lines"), "no engine is left: e0 (dead)"),
        (ValueError("the prompt is SECRET"), "ValueError"),
    ],
    ids=repr,
)
def test_the_file_says_when_and_why_the_process_ended(
    tmp_path: Path, error: BaseException | None, reason: str | None
) -> None:
    for _ in range(2):  # a run that is resumed
        with (
            pytest.raises(type(error)) if error is not None else nullcontext(),
            EventLog(tmp_path / "events.jsonl") as event_log,
        ):
            event_log.emit("tick")
            if error is not None:
                raise error
    records = [orjson.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    assert [record["kind"] for record in records] == ["opened", "tick", "closed"] * 2
    assert [record["reason"] for record in records if record["kind"] == "closed"] == [reason, reason]


def report(version: int, errors: dict[str, EngineError | None]) -> PublishReport:
    engines = tuple(EngineReport(n, e, False, 0.1, 0.2, 0.3, 0.4, 0.5) for n, e in errors.items())
    return PublishReport(version, 1000, 1.5, 0.7, engines)


def test_sleep_and_new_versions_are_written_and_do_not_crowd_out_what_matters(tmp_path: Path) -> None:
    state = ReplicaState("e0", "http://e0", Phase.READY, version=1, base=1)
    with EventLog(tmp_path / "events.jsonl") as event_log:
        for event in (Slept(), Slept(), Woke(), Attested(2)):
            event_log.changed(state, state := after(state, event))
    assert not event_log.newest
    written = [(line["version"], line["asleep"]) for line in lines(tmp_path / "events.jsonl")]
    assert written == [(None, "kv_cache weights"), (None, None), (2, None)]


def test_a_publish_is_logged_by_engine_and_leg_and_as_a_whole(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as event_log:
        with event_log.publishing(3) as publishing:
            publishing.report = report(3, {"e0": None, "e1": EngineFailed("e1", "bits fell over")})
        with pytest.raises(PublishError), event_log.publishing(4):
            raise PublishError("no engine took it\nand more lines")
    metrics = event_log.metrics
    assert metrics.publishes == {("e0", True): 1, ("e1", False): 1}
    assert {leg: spans.seconds for (engine, leg), spans in metrics.legs.items() if engine == "e0"} == {
        "begin": 0.1, "load": 0.2, "attest": 0.3, "commit": 0.4, "pause": 0.5,
    }  # fmt: skip
    assert not any(engine == "e1" for engine, _ in metrics.legs)
    assert (metrics.published_bytes, metrics.newest) == (1000, 3)
    sound, failed, whole, untaken = lines(tmp_path / "events.jsonl")
    assert (sound["kind"], sound["engine"], sound["load_seconds"]) == ("publish_engine", "e0", 0.2)
    assert failed["reason"] == "engine e1: bits fell over"
    assert (whole["kind"], whole["version"], whole["engines"], whole["failed"]) == ("publish", 3, 1, "e1")
    assert (untaken["kind"], untaken["version"], untaken["reason"]) == ("publish_failed", 4, "no engine took it")


def test_restarts_and_retries_are_counted_by_how_they_went() -> None:
    event_log = EventLog()
    with event_log.restarting("e0"):
        pass
    with pytest.raises(PublishError), event_log.restarting("e0"):
        raise PublishError("it did not take the version")
    event_log.retried("e0", attempt=1, continued=False)
    event_log.retried("e0", attempt=2, continued=True)
    assert event_log.metrics.restarts == {("e0", True): 1, ("e0", False): 1}
    assert event_log.metrics.retries == {True: 1, False: 1}
    assert [entry.kind for entry in event_log.newest] == ["restart", "restart_failed", "retry", "retry"]


@given(st.lists(st.floats(0, 1000)))
def test_each_length_of_time_is_in_exactly_one_bucket_whose_bound_it_does_not_exceed(seconds: list[float]) -> None:
    spans = Spans()
    for each in seconds:
        spans.add(each)
    assert spans.count == sum(spans.below) == len(seconds)
    for index, bound in enumerate(REQUEST_BOUNDS):
        assert sum(spans.below[: index + 1]) == sum(each <= bound for each in seconds)


def test_only_the_newest_are_remembered_and_all_are_written(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as event_log:
        for number in range(REMEMBERED + 5):
            event_log.emit("tick", number=number)
    assert [entry.fields["number"] for entry in event_log.newest] == list(range(5, REMEMBERED + 5))
    assert [line["number"] for line in lines(tmp_path / "events.jsonl")] == list(range(REMEMBERED + 5))


def test_a_file_is_appended_to_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(2):
        with EventLog(path) as event_log:
            event_log.emit("run", number=number)
        event_log.emit("late")  # counted in the metrics, but not written
    assert [line["number"] for line in lines(path)] == [0, 1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_cant_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="events.jsonl can't be written: No such file or directory"):
        EventLog(tmp_path / "nowhere" / "events.jsonl")


FULL = """
import logging, resource, sys
from pathlib import Path
from millrace.fleet.event_log import EventLog
logging.basicConfig(stream=sys.stdout, format="%(message)s")
path = Path(sys.argv[1])
with EventLog(path) as event_log:
    event_log.emit("before")
    limit = path.stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for number in range(3):
        event_log.emit("lost", number=number)
    assert event_log.metrics.unwritten == 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    event_log.emit("after")
"""


def test_a_full_disk_ends_nothing_is_said_once_and_leaves_every_later_line_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    said = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.count("can't be written") == 1
    _, first, torn, last, _ = path.read_bytes().splitlines()
    assert (orjson.loads(first)["kind"], orjson.loads(last)["kind"]) == ("before", "after")
    assert len(torn) == 10
