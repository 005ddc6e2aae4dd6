"""Traces of samples and publishes, by OpenTelemetry's SDK."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.config.tracking import TracingConfig
from millrace.errors import ConfigError, NoEngineError
from millrace.fleet.event_log import EventLog
from millrace.fleet.local import open_fleet
from millrace.http.serving import serving
from millrace.launch.ports import bound, url_of
from millrace.rollout.sample import Problem, SampleStatus
from millrace.rollout.tools import Calculator, ToolCall, answer_tool_call
from millrace.tracing import OFF, open_tracing, span, trace, traced_by
from millrace.tracing.otel import OtelTracer
from tests.agents import test_player as agents
from tests.config.test_loading import VALID
from tests.processes import run_to_end
from tests.rollout.test_scheduler import make_runner

QUESTION = "Lena has fifteen pens"


class Spans:
    """The spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self.exporter = exporter

    def named(self, name: str) -> list[ReadableSpan]:
        return [one for one in self.exporter.get_finished_spans() if one.name == name]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        assert parent.context is not None
        spans = self.exporter.get_finished_spans()
        return [one for one in spans if one.parent is not None and one.parent.span_id == parent.context.span_id]


@contextlib.contextmanager
def recorded(ratio: float = 1.0) -> Iterator[Spans]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with traced_by(OtelTracer(provider, ratio)):
        yield Spans(exporter)
    provider.shutdown()


async def test_a_sample_and_a_publish_have_their_parts(tiny_model: Path, tmp_path: Path) -> None:
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1)
    problem = Problem.of_question("p1", QUESTION, "15")
    weights = [
        (name, one.detach()) for name, one in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()
    ]
    with recorded() as spans:
        async with open_fleet(config, tiny_model, log_dir=tmp_path, event_log=EventLog()) as fleet:
            await fleet.publish(weights, deadline=60)
            samples = await asyncio.gather(
                *(make_runner(fleet, tiny_model).run(f"s{i}", "g", problem) for i in range(3))
            )
            names = set(fleet.engines)
    assert [one.status for one in samples] == [SampleStatus.FINISHED] * 3
    assert {one.attributes["millrace.sample"] for one in spans.named("sample")} == {"s0", "s1", "s2"}  # type: ignore[index]
    for root in spans.named("sample"):
        assert root.parent is None
        [queue, generate, reward] = spans.below(root)
        assert (queue.name, generate.name, reward.name) == ("queue", "generate", "reward")
        about = dict(generate.attributes or {})
        assert about["millrace.engine"] in names
        assert about["millrace.weight_versions"] == (1,)
        assert about["gen_ai.usage.output_tokens"] == 24
        assert about["gen_ai.response.finish_reasons"] == ("length",)
        for part in (queue, generate, reward):
            assert root.start_time <= part.start_time <= part.end_time <= root.end_time  # type: ignore[operator]
    [published] = spans.named("publish")
    assert (published.attributes or {})["millrace.weight_version"] == 1
    for engine in names:
        legs = [one.name for one in spans.below(published) if (one.attributes or {})["millrace.engine"] == engine]
        assert set(legs) == {"check", "begin", "load", "attest", "commit"}
    assert_no_text(spans.exporter.get_finished_spans())


def assert_no_text(spans: Sequence[ReadableSpan]) -> None:
    text = " ".join(one.to_json() for one in spans)
    assert "Lena" not in text
    assert "pens" not in text


async def test_a_tool_is_a_part_without_what_it_was_asked(tiny_model: Path) -> None:
    with recorded() as spans:
        with trace("sample", {}):
            call = ToolCall("calculator", {"expression": "11 + 31"})
            assert (await answer_tool_call(call, {"calculator": Calculator()})).text == "42"
            bad = ToolCall("calculator", {"expression": "sixteen"})
            assert (await answer_tool_call(bad, {"calculator": Calculator()})).failed
            await answer_tool_call(ToolCall("made_up_by_the_model", {}), {"calculator": Calculator()})
        [good, failed] = spans.named("tool")
    assert good.attributes == {"millrace.tool": "calculator"}
    assert failed.attributes == {"millrace.tool": "calculator", "error.type": "ToolError"}
    assert (failed.status.description, failed.events) == ("ToolError", ())
    assert not any(word in one.to_json() for one in (good, failed) for word in ("sixteen", "made_up"))


async def test_requests_of_an_agent_belong_to_its_sample(tmp_path: Path) -> None:
    """The gateway answers them in tasks of its HTTP server."""

    class Fleet(agents.Fleet):
        async def generate(self, request: Any, **more: Any) -> Any:
            with span("generate"):
                return await super().generate(request, **more)

    fleet = Fleet(agents.TOKENIZER, agents.FORMAT.stop_token_ids[0], lambda _: "#### 7")
    with recorded() as spans:
        with trace("sample", {}):
            await agents.play(agents.config("ask('hello')"), tmp_path, fleet)
        [root] = spans.named("sample")
        assert sorted(one.name for one in spans.below(root)) == ["agent", "generate"]


async def test_what_fails_has_its_type_and_not_its_message() -> None:
    with recorded() as spans:
        with pytest.raises(NoEngineError), trace("sample", {}), span("generate"):
            raise NoEngineError(QUESTION)
        await _cancelled()
    assert [(one.attributes or {})["error.type"] for one in spans.exporter.get_finished_spans()] == [
        "NoEngineError", "NoEngineError", "CancelledError",
    ]  # fmt: skip
    assert_no_text(spans.exporter.get_finished_spans())


async def _cancelled() -> None:
    async def sample() -> None:
        with trace("sample", {}):
            await asyncio.sleep(60)

    task = asyncio.create_task(sample())
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_the_ratio_is_of_samples_and_every_publish_is_traced() -> None:
    ids = [f"{group}-{index}" for group in range(250) for index in range(8)]
    chosen = []
    for _ in range(2):
        with recorded(0.1) as spans:
            for one in ids:
                with trace("sample", {"millrace.sample": one}, ratio_by=one), span("generate"):
                    pass
            for _ in range(5):
                with trace("publish", {}):
                    pass
            assert len(spans.named("publish")) == 5
            assert len(spans.named("generate")) == len(spans.named("sample"))
            chosen.append([(one.attributes or {})["millrace.sample"] for one in spans.named("sample")])
    assert chosen[0] == chosen[1]
    assert 120 < len(chosen[0]) < 280
    for ratio, count in ((0.0, 0), (1.0, len(ids))):
        with recorded(ratio) as spans:
            for one in ids:
                with trace("sample", {}, ratio_by=one):
                    pass
        assert len(spans.named("sample")) == count


def test_without_tracing_nothing_is_imported_and_nothing_recorded() -> None:
    with trace("sample", {}) as traced, span("generate") as part:
        assert traced is part is OFF
    code = "import sys, millrace.train.experiment; print(any(n.startswith('opentelemetry') for n in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.strip() == "False"


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "millrace.tracing.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"tracing: .*pip install 'millrace\[otel\]'"):
        async with open_tracing(TracingConfig(), "run", 0):
            pass


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[tuple[dict[str, Any], Any]]]]:
    """Serve what takes OTLP over HTTP. Yields its URL, and the spans that come, each with its resource's attributes."""
    came: list[tuple[dict[str, Any], Any]] = []

    async def take(http: web.Request) -> web.Response:
        assert http.headers["Content-Type"] == "application/x-protobuf"
        message = ExportTraceServiceRequest.FromString(await http.read())
        for resource in message.resource_spans:
            about = {one.key: one.value.string_value or one.value.int_value for one in resource.resource.attributes}
            came.extend((about, one) for scope in resource.scope_spans for one in scope.spans)
        body = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=body, content_type="application/x-protobuf")

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/v1/traces", take)])
    with bound("127.0.0.1", 0) as sock:
        async with serving(app, sock):
            yield url_of(*sock.getsockname()[:2]), came


async def test_a_run_sends_its_traces_to_a_collector(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID)
    async with collector() as (url, came):
        command = [sys.executable, "-m", "millrace", "train", str(tmp_path / "run.yaml"), "name=traced"]
        settings = [f"output_dir={tmp_path}", "engine.replicas=1", "train.steps=2", "rollout.groups_per_step=2"]
        traced = (f"tracing.endpoint={url}", "tracing.ratio=1")
        status, out, _ = await run_to_end(*command, *settings, *traced, deadline=120)
    assert status == 0, out
    about, _ = came[0]
    assert (about["service.name"], about["millrace.run"], about["millrace.rank"]) == ("millrace", "traced", 0)
    spans = [one for _, one in came]
    names = {one.span_id: one.name for one in spans}
    parents = {(one.name, names.get(one.parent_span_id)) for one in spans}
    of_publish = {("publish", None), *((leg, "publish") for leg in ("check", "begin", "load", "attest", "commit"))}
    assert parents == {("sample", None), *((part, "sample") for part in ("queue", "generate", "reward")), *of_publish}
    assert sum(one.name == "publish" for one in spans) == 3  # the starting weights, and each step
    assert sum(one.name == "sample" for one in spans) == 2 * 2 * 4 + 2 * 10  # and two evaluations of ten problems


async def test_a_collector_that_is_away_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    async with asyncio.timeout(30):
        async with open_tracing(TracingConfig(endpoint="http://127.0.0.1:9", ratio=1.0), "run", 0):
            for index in range(3000):
                with trace("sample", {}, ratio_by=str(index)):
                    pass
                if index % 1000 == 0:
                    await asyncio.sleep(0.1)
    [warning] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "traces can't be sent to http://127.0.0.1:9; check that a collector takes OTLP" in warning.getMessage()


async def test_the_environments_endpoint_and_name_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    async with collector() as (url, came):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my-training")
        async with open_tracing(TracingConfig(), "run", 0):
            with trace("publish", {}):
                pass
    [(about, one)] = came
    assert (about["service.name"], one.name) == ("my-training", "publish")
