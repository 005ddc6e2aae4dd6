"""A fleet's metrics in Prometheus' text format. Pure functions of a view and the event log's metrics."""

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

from millrace.fleet.event_log import REQUEST_BOUNDS, Metrics, Spans
from millrace.fleet.replica_state import Phase
from millrace.fleet.routing import Why
from millrace.serve.view import EngineView, FleetView
from millrace.types import EngineLoad

Samples = Iterable[tuple[Sequence[str], float | None]]  # labels and value; a sample of None is left out


def exposition(view: FleetView, metrics: Metrics) -> bytes:
    """Return the text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    of_fleet = (*_engines(view), *_versions(view), *_requests(metrics), *_weights(metrics))
    registry.register(_Fixed([*of_fleet, *_training(view)]))
    return generate_latest(registry)


class _Fixed(Collector):
    """A collector of finished metric families: engines are queried in the event loop, and `collect` can't wait."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _engines(view: FleetView) -> Iterator[Metric]:
    def of_each(name: str, help_text: str, value: Callable[[EngineView], float | None]) -> Metric:
        return _gauge(name, help_text, ["engine"], (([e.name], value(e)) for e in view.engines))

    def of_loads(name: str, help_text: str, value: Callable[[EngineLoad], float]) -> Metric:
        loads = [(e.name, e.load) for e in view.engines if e.load is not None]
        return _gauge(name, help_text, ["engine"], (([engine], value(load)) for engine, load in loads))

    states = (([e.name, phase], float(e.state is phase)) for e in view.engines for phase in Phase)
    yield _gauge("millrace_engine_state", "1 for the state that the engine is in.", ["engine", "state"], states)
    yield of_each("millrace_engine_routable", "1 if the engine gets requests.", lambda e: e.routable)
    yield of_each("millrace_engine_asleep", "1 if some of the engine's memory is released.", lambda e: bool(e.asleep))
    yield of_each("millrace_engine_answers", "1 if it reported its load in time.", lambda e: e.load is not None)
    yield of_each("millrace_engine_weight_version", "The weight version that the engine serves.", lambda e: e.version)
    yield of_each("millrace_engine_version_lag", "Versions behind the newest.", lambda e: e.lag)
    yield of_each(
        "millrace_engine_outstanding_tokens",
        "Prompt tokens and maximum output tokens of the requests in flight.",
        lambda e: e.outstanding_tokens,
    )
    yield of_each(
        "millrace_engine_headroom_tokens",
        "Tokens of its KV cache that stay free at the fullest moment of its requests, as forecast.",
        lambda e: e.headroom_tokens,
    )
    waiting = "Requests that wait for room on an engine, or for the first engine."
    yield _gauge("millrace_waiting_requests", waiting, [], [([], float(view.waiting))])
    size = view.size
    for name, help_text, number in (
        ("wanted", "Engines that there should be by the load, or by the settings.", size.wanted if size else None),
        ("serving", "Engines that get requests.", size.serving if size else None),
        ("starting", "Engines that are being started, or get their weights.", size.starting if size else None),
    ):
        yield _gauge(f"millrace_engines_{name}", help_text, [], [([], number)])
    yield of_loads("millrace_engine_running_requests", "Requests that it runs.", lambda x: x.running_requests)
    yield of_loads("millrace_engine_waiting_requests", "Requests in its queue.", lambda x: x.waiting_requests)
    yield of_loads("millrace_engine_used_tokens", "Tokens in its KV cache.", lambda x: x.used_tokens)
    yield of_loads("millrace_engine_max_tokens", "Tokens that fit into its KV cache.", lambda x: x.max_tokens)
    yield of_loads(
        "millrace_engine_tokens_per_second",
        "Output tokens, as the engine reports them; some engines keep the last value while they are idle.",
        lambda x: x.tokens_per_second,
    )


def _versions(view: FleetView) -> Iterator[Metric]:
    help_text = "The newest weight version that an engine accepted."
    yield _gauge("millrace_newest_weight_version", help_text, [], [([], view.newest_version)])


def _requests(metrics: Metrics) -> Iterator[Metric]:
    yield _counter(
        "millrace_requests_total",
        "Ended calls to engines; engine is empty if none could take the request.",
        ["engine", "outcome"],
        (([engine, outcome], count) for (engine, outcome), count in metrics.requests.items()),
    )
    yield _counter(
        "millrace_routed_total",
        "Requests by the reason for the choice of their engine (docs/routing.md).",
        ["why"],
        (([why], metrics.routed[why]) for why in Why),
    )
    seconds = HistogramMetricFamily("millrace_request_seconds", "Duration of finished calls.", labels=["engine"])
    for engine, spans in metrics.request_spans.items():
        seconds.add_metric([engine], _buckets(spans), spans.seconds)
    yield seconds
    waits = HistogramMetricFamily("millrace_wait_seconds", "Wait of sent requests for room on an engine.")
    if metrics.waits.count:
        waits.add_metric([], _buckets(metrics.waits), metrics.waits.seconds)
    yield waits
    for name, help_text, counted in (
        ("millrace_prompt_tokens_total", "Prompt tokens of answered requests.", metrics.prompt_tokens),
        ("millrace_cached_tokens_total", "Of these, tokens found in the prefix cache.", metrics.cached_tokens),
        ("millrace_output_tokens_total", "Output tokens of answered requests.", metrics.output_tokens),
    ):
        yield _counter(name, help_text, ["engine"], (([engine], count) for engine, count in counted.items()))
    yield _counter(
        "millrace_sample_retries_total",
        "Retries of samples after an engine failure: continued from their tokens, or restarted.",
        ["how"],
        ((["continued" if continued else "restarted"], metrics.retries[continued]) for continued in (True, False)),
    )


def _weights(metrics: Metrics) -> Iterator[Metric]:
    yield _counter(
        "millrace_scale_events_total",
        "Engines that the fleet has added (up) or removed (down) by its load, by whether that succeeded.",
        ["direction", "outcome"],
        (([direction, _outcome(sound)], count) for (direction, sound), count in metrics.scalings.items()),
    )
    yield _counter(
        "millrace_engine_state_entered_total",
        "How often the engine entered the state.",
        ["engine", "state"],
        (([engine, phase], count) for (engine, phase), count in metrics.entered.items()),
    )
    yield _counter(
        "millrace_engine_restarts_total",
        "Restarts, by whether the engine started and got the current weights.",
        ["engine", "outcome"],
        (([engine, _outcome(sound)], count) for (engine, sound), count in metrics.restarts.items()),
    )
    yield _counter(
        "millrace_publishes_total",
        "Weight versions and adapters sent to the engine, by whether it accepted them.",
        ["engine", "outcome"],
        (([engine, _outcome(sound)], count) for (engine, sound), count in metrics.publishes.items()),
    )
    legs = SummaryMetricFamily(
        "millrace_publish_leg_seconds",
        "Parts of accepted publishes: begin, load, attest, commit, and pause (the engine generated nothing).",
        labels=["engine", "leg"],
    )
    for (engine, leg), spans in metrics.legs.items():
        legs.add_metric([engine, leg], spans.count, spans.seconds)
    yield legs
    published = float(metrics.published_bytes)
    yield _counter("millrace_published_bytes_total", "Bytes of versions, each counted once.", [], [([], published)])
    lost = float(metrics.unwritten)
    help_text = "Events missing in events.jsonl because the disk was full."
    yield _counter("millrace_events_unwritten_total", help_text, [], [([], lost)])


def _training(view: FleetView) -> Iterator[Metric]:
    """Yield the figures of the trainer's last step."""
    if (training := view.training) is None:
        return
    for name, help_text in (
        ("step", "Steps that the trainer has done."),
        ("accuracy", "Mean reward of greedy answers to held-out problems, in the last evaluation."),
        ("reward", "Mean reward of the step's samples."),
        ("staleness", "Mean age of the step's samples, in weight versions."),
        ("loss", "Loss of the step."),
        ("kl", "Estimated KL divergence of the trainer's weights from those that generated."),
        ("clip_fraction", "Share of the tokens whose ratio was clipped."),
        ("entropy", "Mean entropy of the tokens, in nats."),
        ("logprob_gap", "Mean difference of the engine's and the trainer's logprobs, in nats."),
        ("grad_norm", "Norm of the gradient before it is clipped."),
        ("lr", "Learning rate."),
        ("tokens_per_second", "Tokens that the model generated in a second of generation."),
    ):
        yield _gauge(f"millrace_train_{name}", help_text, [], [([], getattr(training, name))])
    parts = (([part], value) for part, value in training.rewards.items())
    yield _gauge("millrace_train_reward_part", "Means of the reward's parts, unweighted.", ["part"], parts)
    phases = (([phase], seconds) for phase, seconds in training.seconds.items())
    yield _gauge("millrace_train_phase_seconds", "Seconds of the step by phase; step is the whole.", ["phase"], phases)
    ended = (([status], float(count)) for status, count in training.samples.items())
    yield _counter("millrace_train_samples_total", "Samples of the steps, by how they ended.", ["status"], ended)


def _buckets(spans: Spans) -> list[tuple[str, float]]:
    bounds = [*map(str, REQUEST_BOUNDS), "+Inf"]
    return [(b, float(n)) for b, n in zip(bounds, itertools.accumulate(spans.below), strict=True)]


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
