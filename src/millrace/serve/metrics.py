"""A fleet in Prometheus' words. Pure: from a view and the event log's metrics to metric families."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from millrace.fleet.event_log import REQUEST_BOUNDS, Metrics
from millrace.fleet.replica_state import Phase
from millrace.fleet.routing import Why
from millrace.serve.view import EngineView, FleetView
from millrace.types import EngineLoad

Samples = Iterable[tuple[Sequence[str], float | None]]  # labels and value; None has no sample


def exposition(view: FleetView, metrics: Metrics) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed([*_engines(view), *_versions(view), *_requests(metrics), *_weights(metrics)]))
    return generate_latest(registry)


class _Fixed(Collector):
    """What was made before it is collected: engines are asked in the event loop, and collecting can't wait."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _engines(view: FleetView) -> Iterator[Metric]:
    def of_each(name: str, help_text: str, value: Callable[[EngineView], float | None]) -> Metric:
        return _gauge(name, help_text, ["engine"], (([e.name], value(e)) for e in view.engines))

    def as_it_says(name: str, help_text: str, value: Callable[[EngineLoad], float]) -> Metric:
        loads = [(e.name, e.load) for e in view.engines if e.load is not None]
        return _gauge(name, help_text, ["engine"], (([engine], value(load)) for engine, load in loads))

    states = (([e.name, phase], float(e.state is phase)) for e in view.engines for phase in Phase)
    yield _gauge("millrace_engine_state", "1 for the state that the engine is in.", ["engine", "state"], states)
    yield of_each("millrace_engine_routable", "Whether it gets requests.", lambda e: e.routable)
    yield of_each("millrace_engine_asleep", "Whether some of its memory is released.", lambda e: bool(e.asleep))
    yield of_each("millrace_engine_answers", "Whether it said in time what it does.", lambda e: e.load is not None)
    yield of_each("millrace_engine_weight_version", "The version that it serves.", lambda e: e.version)
    yield of_each("millrace_engine_version_lag", "Versions behind the newest.", lambda e: e.lag)
    yield of_each(
        "millrace_engine_outstanding_tokens",
        "Prompt tokens and room for output of the requests that were sent and have not come back.",
        lambda e: e.outstanding_tokens,
    )
    yield as_it_says("millrace_engine_running_requests", "That it generates for.", lambda x: x.running_requests)
    yield as_it_says("millrace_engine_waiting_requests", "In its queue.", lambda x: x.waiting_requests)
    yield as_it_says("millrace_engine_used_tokens", "Of its KV cache.", lambda x: x.used_tokens)
    yield as_it_says("millrace_engine_max_tokens", "Of its KV cache.", lambda x: x.max_tokens)
    yield as_it_says(
        "millrace_engine_tokens_per_second",
        "That it generates, as it says; some keep the last figure when they have nothing to do.",
        lambda x: x.tokens_per_second,
    )


def _versions(view: FleetView) -> Iterator[Metric]:
    yield _gauge("millrace_newest_weight_version", "That some engine took.", [], [([], view.newest_version)])


def _requests(metrics: Metrics) -> Iterator[Metric]:
    yield _counter(
        "millrace_requests_total",
        "Calls to engines that ended; engine is empty where none could take the request.",
        ["engine", "outcome"],
        (([engine, outcome], count) for (engine, outcome), count in metrics.requests.items()),
    )
    yield _counter(
        "millrace_routed_total",
        "Requests by what chose their engine (docs/routing.md).",
        ["why"],
        (([why], metrics.routed[why]) for why in Why),
    )
    seconds = HistogramMetricFamily("millrace_request_seconds", "Of calls that finished.", labels=["engine"])
    for engine, spans in metrics.request_spans.items():
        bounds = [*map(str, REQUEST_BOUNDS), "+Inf"]
        below = itertools.accumulate(spans.below)
        seconds.add_metric([engine], [(b, float(n)) for b, n in zip(bounds, below, strict=True)], spans.seconds)
    yield seconds
    for name, help_text, counted in (
        ("millrace_prompt_tokens_total", "Of requests that came back.", metrics.prompt_tokens),
        ("millrace_cached_tokens_total", "Of these prompts, found in the prefix cache.", metrics.cached_tokens),
        ("millrace_output_tokens_total", "That came back.", metrics.output_tokens),
    ):
        yield _counter(name, help_text, ["engine"], (([engine], count) for engine, count in counted.items()))
    yield _counter(
        "millrace_sample_retries_total",
        "Samples that went on after an engine failed under them: from the tokens that they had, or anew.",
        ["how"],
        ((["continued" if continued else "anew"], metrics.retries[continued]) for continued in (True, False)),
    )


def _weights(metrics: Metrics) -> Iterator[Metric]:
    yield _counter(
        "millrace_engine_state_entered_total",
        "How often the engine came into the state.",
        ["engine", "state"],
        (([engine, phase], count) for (engine, phase), count in metrics.entered.items()),
    )
    yield _counter(
        "millrace_engine_restarts_total",
        "New starts, by whether the engine came up and caught up.",
        ["engine", "outcome"],
        (([engine, _outcome(sound)], count) for (engine, sound), count in metrics.restarts.items()),
    )
    yield _counter(
        "millrace_publishes_total",
        "Weight versions and adapters sent to the engine, by whether it took them.",
        ["engine", "outcome"],
        (([engine, _outcome(sound)], count) for (engine, sound), count in metrics.publishes.items()),
    )
    legs = SummaryMetricFamily(
        "millrace_publish_leg_seconds",
        "Of versions that the engine took: begin, load, attest, commit, and pause (it generated nothing).",
        labels=["engine", "leg"],
    )
    for (engine, leg), spans in metrics.legs.items():
        legs.add_metric([engine, leg], spans.count, spans.seconds)
    yield legs
    published = float(metrics.published_bytes)
    yield _counter("millrace_published_bytes_total", "Of versions, each counted once.", [], [([], published)])
    lost = float(metrics.unwritten)
    yield _counter("millrace_events_unwritten_total", "Missing in events.jsonl: no room on disk.", [], [([], lost)])


def _outcome(sound: bool) -> str:
    return "ok" if sound else "failed"


def _gauge(name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(name, help_text, labels=labels), samples)


def _counter(name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(name, help_text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family
