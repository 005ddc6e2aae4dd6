"""The metrics of a fleet, and its view as JSON and as a table, on real engines."""

import asyncio
import contextlib
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
import torch
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.config.engines import ReplicaRange
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import ConfigError, EngineError, MonitorError
from millrace.fleet.autoscaler import FleetSize
from millrace.fleet.event_log import Entry, EventLog, Metrics
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.launch.ports import free_port
from millrace.serve.metrics import exposition
from millrace.serve.remote import Remote
from millrace.serve.server import serve_metrics
from millrace.serve.table import fleet_table
from millrace.serve.view import EngineView, FleetView, Observer, TrainingView
from millrace.types import EngineLoad, GenerateRequest, Health, MemoryTag, SamplingParams
from tests.processes import run_to_end

CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)
PROMPT = tuple(range(5, 45))

pytestmark = pytest.mark.asyncio(loop_scope="module")

Scraped = Mapping[tuple[str, ...], float]  # keyed by the metric's name and the values of its labels


@dataclass(frozen=True, slots=True)
class Shown:
    fleet: Fleet
    event_log: EventLog
    url: str
    events: Path


@contextlib.asynccontextmanager
async def show(model: Path, folder: Path) -> AsyncIterator[Shown]:
    events = folder / "events.jsonl"
    with EventLog(events) as event_log:
        observer = Observer(event_log)
        async with (
            serve_metrics(observer, "127.0.0.1", 0) as url,
            open_fleet(CONFIG, model, log_dir=folder, event_log=event_log) as fleet,
        ):
            observer.fleets = (fleet,)
            yield Shown(fleet, event_log, url, events)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shown(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shown]:
    async with show(tiny_model, tmp_path_factory.mktemp("shown")) as made:
        yield made


def tensors(folder: Path) -> list[tuple[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def request(request_id: str, tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(PROMPT, SamplingParams(tokens, temperature=0.0, ignore_eos=True), request_id=request_id)


async def scrape(url: str) -> Scraped:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.get(url + "/metrics") as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(await response.text()))
    assert all(family.documentation and family.name.startswith("millrace_") for family in families)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def grown(after: Scraped, before: Scraped) -> Callable[..., float]:
    return lambda *name: after.get(name, 0.0) - before.get(name, 0.0)


async def look(url: str) -> FleetView:
    remote = Remote(url)
    try:
        return await remote.fetch(deadline=10)
    finally:
        await remote.close()


async def millrace(*arguments: str) -> tuple[int | None, str, str]:
    return await run_to_end(sys.executable, "-m", "millrace", *arguments, deadline=60, apart=True)


async def test_the_counts_match_what_was_done(shown: Shown) -> None:
    before = await scrape(shown.url)
    made = await asyncio.gather(*(shown.fleet.generate(request(f"r{i}"), deadline=20) for i in range(6)))
    cut_short = asyncio.create_task(shown.fleet.generate(request("cut", 100), deadline=20))
    async with asyncio.timeout(10):
        while not any(shown.fleet.outstanding.values()):
            await asyncio.sleep(0)
    cut_short.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut_short
    with pytest.raises(EngineError):  # no engine takes this temperature
        refused = GenerateRequest(PROMPT, SamplingParams(4, temperature=-1.0), request_id="bad")
        await shown.fleet.generate(refused, deadline=20)
    since = grown(await scrape(shown.url), before)
    names = list(shown.fleet.engines)

    def over_engines(metric: str, *labels: str) -> float:
        return sum(since(metric, name, *labels) for name in names)

    assert over_engines("millrace_requests_total", "finished") == 6
    assert over_engines("millrace_requests_total", "aborted") == 1
    assert over_engines("millrace_requests_total", "refused") == 1
    assert over_engines("millrace_requests_total", "failed") == 0
    assert over_engines("millrace_prompt_tokens_total") == sum(g.prompt_tokens for g in made) == 6 * len(PROMPT)
    assert over_engines("millrace_cached_tokens_total") == sum(g.cached_tokens for g in made)
    assert over_engines("millrace_output_tokens_total") == 6 * 4
    assert over_engines("millrace_request_seconds_count") == 6
    assert since("millrace_wait_seconds_count") == 8
    assert over_engines("millrace_request_seconds_bucket", "+Inf") == 6


async def test_engines_are_shown_with_their_versions_and_their_own_metrics(shown: Shown) -> None:
    slow = [engine for engine in shown.fleet.engines.values() if isinstance(engine, EmbeddedEngine)]
    for engine in slow:
        await engine.inject_fault("slow", seconds=0.05)
    running = [asyncio.create_task(shown.fleet.generate(request(f"s{i}", 150), deadline=30)) for i in range(2)]
    async with asyncio.timeout(15):
        while [e.load and e.load.running_requests for e in (await look(shown.url)).engines] != [1, 1]:
            await asyncio.sleep(0.05)
    metrics = await scrape(shown.url)
    for name, state in zip(shown.fleet.engines, shown.fleet.snapshot.replicas, strict=True):
        assert metrics["millrace_engine_running_requests", name] == 1
        assert metrics["millrace_engine_outstanding_tokens", name] == len(PROMPT) + 150
        room = metrics["millrace_engine_max_tokens", name]
        assert 0.9 * room - len(PROMPT) - 150 < metrics["millrace_engine_headroom_tokens", name] < room - 150
        assert metrics["millrace_engine_weight_version", name] == state.version
        assert metrics["millrace_engine_version_lag", name] == 0
        assert metrics["millrace_engine_routable", name] == 1
        assert {phase: metrics["millrace_engine_state", name, phase] for phase in Phase} == {
            phase: float(phase is Phase.READY) for phase in Phase
        }
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for engine in slow:
        await engine.inject_fault("slow", seconds=0.0)


async def test_each_leg_of_a_publish_is_shown_and_so_is_a_refused_publish(shown: Shown, tiny_model: Path) -> None:
    version = (shown.event_log.metrics.newest or 0) + 1
    before = await scrape(shown.url)
    report = await shown.fleet.publish(tensors(tiny_model), version)
    metrics = await scrape(shown.url)
    since = grown(metrics, before)
    assert metrics["millrace_newest_weight_version",] == version
    assert since("millrace_published_bytes_total") == report.nbytes
    for engine in report.engines:
        assert since("millrace_publishes_total", engine.engine, "ok") == 1
        for leg, seconds in (("load", engine.load_seconds), ("commit", engine.commit_seconds)):
            assert since("millrace_publish_leg_seconds_sum", engine.engine, leg) == pytest.approx(seconds)
            assert since("millrace_publish_leg_seconds_count", engine.engine, leg) == 1
    told = [entry for entry in (await look(shown.url)).events if entry.kind == "publish"][-1]
    assert (told.fields["version"], told.fields["engines"], told.fields["nbytes"]) == (version, 2, report.nbytes)


async def test_a_sleeping_engine_is_shown_asleep_and_counts_as_ready(shown: Shown, tiny_model: Path) -> None:
    version = (shown.event_log.metrics.newest or 0) + 1
    await shown.fleet.sleep()
    try:
        view, metrics = await look(shown.url), await scrape(shown.url)
    finally:
        await shown.fleet.wake()
        await shown.fleet.publish(tensors(tiny_model), version)
    assert [e.asleep for e in view.engines] == [tuple(sorted(MemoryTag))] * 2
    assert not any(e.routable for e in view.engines)
    assert "0 of 2 engines serving, 2 asleep, 0 starting" in drawn(view)
    assert all(metrics["millrace_engine_asleep", name] == 1 for name in shown.fleet.engines)
    assert ("millrace_engine_weight_version", "embedded-0") not in metrics  # it has no version; 0 would be one


async def test_a_fleet_that_is_scaled_shows_what_is_wanted_and_what_there_is(shown: Shown) -> None:
    before = await scrape(shown.url)
    assert [before[f"millrace_engines_{what}",] for what in ("wanted", "serving", "starting")] == [2, 2, 0]
    _, out, _ = await millrace("status", shown.url, "--once", "--events", "0")
    assert "requests waiting" not in out  # nothing is amiss
    shown.fleet.autoscale(ReplicaRange(min=1, max=1, idle_seconds=0.5))
    try:
        async with asyncio.timeout(30):
            while len(shown.fleet.snapshot.replicas) > 1:
                await asyncio.sleep(0.02)
        shown.fleet.autoscale(ReplicaRange(min=3, max=3))
        async with asyncio.timeout(30):
            while (view := await look(shown.url)).size != FleetSize(3, 1, 2):
                await asyncio.sleep(0.02)
        _, out, _ = await millrace("status", shown.url, "--once", "--events", "0")
        assert "1 of 3 engines serving, 2 starting; 0 requests waiting" in out
        assert view.waiting == 0
        async with asyncio.timeout(60):
            while len(shown.fleet.snapshot.routable) < 3:
                await asyncio.sleep(0.02)
    finally:
        shown.fleet.autoscale(None)
    await shown.fleet.remove("embedded-2")
    since = grown(await scrape(shown.url), before)
    assert since("millrace_scale_events_total", "down", "ok") == 1
    assert since("millrace_scale_events_total", "up", "ok") == 2
    written = [orjson.loads(line) for line in shown.events.read_bytes().splitlines()]
    assert [e["wanted"] for e in written if e["kind"] == "scale"] == [1, 3]
    assert [e["engine"] for e in written if e["kind"] == "scale_down"] == ["embedded-1"]


async def test_status_prints_the_fleet_once_and_ends(shown: Shown) -> None:
    status, out, err = await millrace("status", shown.url, "--once", "--events", "3")
    assert (status, err) == (0, "")
    rows = {name: next(line for line in out.splitlines() if name in line) for name in shown.fleet.engines}
    version = str(shown.event_log.metrics.newest)
    assert all("ready" in row and version in row.split() for row in rows.values())
    assert sum(line.split()[1:2] == ["fleet"] or line[2:3] == ":" for line in out.splitlines()) == 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doomed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shown]:
    """A fleet for tests that lose an engine. The first test takes the first engine, the second test the second."""
    async with show(tiny_model, tmp_path_factory.mktemp("doomed")) as made:
        yield made


async def test_an_engine_that_is_killed_shows_in_state_event_and_metric(doomed: Shown) -> None:
    victim, _ = [e for e in doomed.fleet.engines.values() if isinstance(e, EmbeddedEngine)]
    with contextlib.suppress(EngineError):
        await victim.inject_fault("crash")
    async with asyncio.timeout(15):
        while doomed.fleet.snapshot.get(victim.name).phase is not Phase.DEAD:
            await asyncio.sleep(0.02)
    metrics, view = await scrape(doomed.url), await look(doomed.url)
    assert metrics["millrace_engine_state", victim.name, "dead"] == 1
    assert metrics["millrace_engine_state", victim.name, "ready"] == 0
    assert metrics["millrace_engine_state_entered_total", victim.name, "dead"] == 1
    assert metrics["millrace_engine_routable", victim.name] == 0
    assert metrics["millrace_engine_answers", victim.name] == 0
    assert ("millrace_engine_running_requests", victim.name) not in metrics
    [dead, alive] = view.engines
    assert (dead.state, dead.load, alive.state) == (Phase.DEAD, None, Phase.READY)
    _, out, _ = await millrace("status", doomed.url, "--once")
    assert "dead" in out

    await doomed.fleet.restart(victim.name)
    metrics = await scrape(doomed.url)
    assert metrics["millrace_engine_restarts_total", victim.name, "ok"] == 1
    assert metrics["millrace_engine_state", victim.name, "ready"] == 1
    written = [orjson.loads(line) for line in doomed.events.read_bytes().splitlines()]
    told = [e for e in written if e["kind"] == "member" and e["engine"] == victim.name]
    assert [e["state"] for e in told][:2] == ["starting", "ready"]
    death = next(e for e in told if e["state"] == "dead")
    assert (death["was"], death["version"]) == ("ready", None)
    assert victim.name in death["reason"]
    assert [e["engine"] for e in written if e["kind"] == "restart"] == [victim.name]


async def test_an_engine_that_hangs_is_shown_as_silent_and_delays_the_view_only_briefly(doomed: Shown) -> None:
    _, stuck = [e for e in doomed.fleet.engines.values() if isinstance(e, EmbeddedEngine)]
    await stuck.inject_fault("hang", where="http")
    async with asyncio.timeout(15):
        while await stuck.health(deadline=0.2) is not Health.BUSY:  # it hangs only once its answer is out
            await asyncio.sleep(0.01)
    async with asyncio.timeout(15):
        while True:  # its last report is used for a moment
            began = time.monotonic()
            answers, silent = (await look(doomed.url)).engines
            assert time.monotonic() - began < 4
            if silent.load is None:
                break
    assert (silent.silence, silent.load) == ("no answer within 2 s", None)
    assert answers.load is not None


async def test_before_the_engines_run_the_view_says_that_they_start() -> None:
    async with serve_metrics(Observer(EventLog()), "127.0.0.1", 0) as url:
        view = await look(url)
        assert (view.engines, view.newest_version) == ((), None)
        assert "the engines are being started" in drawn(view)
        metrics = await scrape(url)
        assert metrics["millrace_published_bytes_total",] == 0


async def test_the_docs_name_every_metric_and_no_other() -> None:
    view = FleetView(0.0, None, (), (), training=TrainingView(0))
    families = text_string_to_metric_families(exposition(view, Metrics()).decode())
    told = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    page = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `millrace_")]
    assert told == {name for row in rows for name in re.findall(r"`(millrace_\w+)`", row)}


async def test_a_trainers_figures_are_shown_while_it_says_them(tmp_path: Path) -> None:
    observer = Observer(EventLog())
    async with serve_metrics(observer, "127.0.0.1", 0) as url:
        assert not [name for name, *_ in await scrape(url) if name.startswith("millrace_train_")]
        observer.training = TrainingView(
            7, accuracy=0.5, rewards={"exact": 0.25}, seconds={"train": 1.5}, samples={"finished": 128, "failed": 2}
        )
        shown = {name: value for name, value in (await scrape(url)).items() if name[0].startswith("millrace_train_")}
        assert (await look(url)).training == observer.training
    assert shown == {
        ("millrace_train_step",): 7,
        ("millrace_train_accuracy",): 0.5,
        ("millrace_train_reward_part", "exact"): 0.25,
        ("millrace_train_phase_seconds", "train"): 1.5,
        ("millrace_train_samples_total", "finished"): 128,
        ("millrace_train_samples_total", "failed"): 2,
    }


async def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*Address already in use.*metrics.port"):
            async with serve_metrics(Observer(EventLog()), "127.0.0.1", port):
                pass


async def test_status_of_a_closed_port_is_one_line() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    status, out, err = await millrace("status", url)
    assert (status, out) == (1, "")
    assert err == f"error: no server listens at {url}; a run answers at its metrics.port while it is running\n"


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [("/fleet", '{"at": "noon"}', "at: Input should be a valid number"), ("/", "", "HTTP 404")],
)
async def test_status_of_another_server_is_one_clear_error(path: str, answer: str, says: str) -> None:
    async def other(_: web.Request) -> web.Response:
        return web.Response(text=answer, content_type="application/json")

    app = web.Application()
    app.add_routes([web.get(path, other)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        port = free_port("127.0.0.1")
        await web.TCPSite(runner, "127.0.0.1", port).start()
        with pytest.raises(MonitorError, match=f"127.0.0.1:{port} is not the metrics server of a run: .*{says}"):
            await look(f"http://127.0.0.1:{port}/metrics")
    finally:
        await runner.cleanup()


def drawn(view: FleetView, trouble: str | None = None) -> str:
    console = Console(width=110)
    with console.capture() as capture:
        console.print(fleet_table(view, events=5, trouble=trouble))
    return capture.get()


LOAD = EngineLoad(running_requests=0, waiting_requests=2, used_tokens=50, max_tokens=200, tokens_per_second=99.0)


@pytest.mark.asyncio(loop_scope="function")
async def test_the_table_shows_no_figure_for_an_unknown_value() -> None:
    idle = EngineView("e0", "http://e0", Phase.READY, True, 7, None, 0, (), None, 0, LOAD, None, 0.25, 3)
    silent = EngineView(
        "[e1]", "http://e1", Phase.SUSPECT, False, None, None, None, (), None, 9, None, "it hangs", None, 0
    )
    event = Entry(0.0, "publish_failed", None, {"reason": "[red]none took it", "version": 8})
    text = drawn(FleetView(0.0, 7, (idle, silent), (event,)), trouble="as of 9 s ago: gone")
    rows = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    # Idle: no tokens a second, whether it reports 99 or not.
    assert rows["e0"] == ["ready", "7", "0", "0", "2", "0", "25%", "25%", "3"]
    assert rows["[e1]"] == ["suspect", "0"]  # only the number of its restarts is known
    assert "[e1]: it does not report its load: it hangs" in text
    assert "reason=[red]none took it version=8" in text
    assert "as of 9 s ago: gone" in text
