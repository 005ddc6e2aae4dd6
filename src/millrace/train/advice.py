"""What a run should be told about itself. Pure functions of the steps so far."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median

from millrace.fleet.event_log import Metrics, Spans
from millrace.rollout.sample import EpisodeEnd
from millrace.train.metrics import StepMetrics

RECENT = 3  # steps that are looked at together, so that one odd step is not enough
SPAN = 5  # steps at the beginning and now, whose logprob gaps are compared
GAP_RATIO = 3.0  # of the median gap now to that at the beginning
GAP_FLOOR = 0.01  # nats; below, a gap is rounding
NEAR_BOUND = 0.9  # of rollout.max_staleness
SLOW = 0.5  # of the others' speed
FEWEST_REQUESTS = 8  # of an engine, so that its speed means something

LIMITS: Mapping[str, str] = {
    EpisodeEnd.TOKEN_LIMIT: "raise rollout.max_turn_tokens or rollout.max_sample_tokens, or ask for shorter answers",
    EpisodeEnd.CONTEXT_FULL: "the engine's context is full: raise engine.context_length, or ask for shorter answers",
    EpisodeEnd.TURN_LIMIT: "raise rollout.max_turns, or look whether the model repeats its calls",
}


@dataclass(frozen=True, slots=True)
class Advisory:
    """One line of advice.jsonl. text: what was seen, with figures. do: what to do about it."""

    step: int
    kind: str
    text: str
    do: str
    engine: str | None = None

    @property
    def record(self) -> dict[str, object]:
        """The advisory as an object for JSON. Only advisories on an engine have `engine`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Work:
    """What one engine did for finished requests. seconds: of all requests together."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.requests + other.requests, self.tokens + other.tokens, self.seconds + other.seconds)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.requests - other.requests, self.tokens - other.tokens, self.seconds - other.seconds)

    @property
    def speed(self) -> float:
        """Tokens per second of one request."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A training step, as advisories see it. work: of each engine in it. failed: a failed sample and its reason."""

    metrics: StepMetrics
    work: Mapping[str, Work] = field(default_factory=dict)
    failed: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Settings of the run that advisories name."""

    samples_per_group: int
    max_staleness: int


def no_signal(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:
    """The last step had no group whose rewards differ."""
    last = steps[-1].metrics
    if last.groups_with_signal == 0 and last.reward is not None:
        yield Advisory(
            last.step,
            "no_signal",
            f"step {last.step} taught nothing: the rewards of each group are all equal (their mean is "
            f"{last.reward:.3g}), so every advantage is 0",
            "Read the answers in samples/: are they cut off, or in another form than the reward expects? Are the "
            f"problems too easy or too hard? rollout.samples_per_group is {bounds.samples_per_group}",
        )


def truncated(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:  # noqa: ARG001
    """Most samples of the last steps ended at a limit."""
    recent = steps[-RECENT:]
    ends: Counter[str] = sum((Counter(seen.metrics.ends) for seen in recent), Counter())
    cut = Counter({end: ends[end] for end in LIMITS if ends[end]})
    if 2 * cut.total() > ends.total():
        [(most, _)] = cut.most_common(1)
        named = ", ".join(f"{count} by {end}" for end, count in cut.most_common())
        yield Advisory(
            recent[-1].metrics.step,
            "truncated",
            f"{cut.total()} of {ends.total()} samples of {_span(recent)} were cut off: {named}",
            f"An answer that is cut off can rarely earn its reward: {LIMITS[most]}",
        )


def gap_rising(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:  # noqa: ARG001
    """The engines' logprobs differ from the trainer's by much more than at the beginning."""
    measured = [seen for seen in steps if seen.metrics.logprob_gap is not None]
    if len(measured) < 2 * SPAN:
        return
    first, now = measured[:SPAN], measured[-SPAN:]
    before, gap = (median(seen.metrics.logprob_gap or 0.0 for seen in part) for part in (first, now))
    if gap >= max(GAP_FLOOR, GAP_RATIO * before):
        yield Advisory(
            now[-1].metrics.step,
            "gap_rising",
            f"the logprobs of engines and trainer differ by {gap:.2g} nats in {_span(now)} (logprob_gap); it was "
            f"{before:.2g} in {_span(first)}",
            "The engines sample from another policy than the one that is trained. In mode standalone, older samples do "
            "that (rollout.max_staleness). Otherwise compare dtypes and quantisation of engine and trainer "
            "(engine.dtype, train.dtype), look at `gap` in samples/ for the samples that differ most, and run "
            "`millrace doctor` on an engine. For a mixture of experts set engine.return_routed_experts",
        )


def staleness_at_bound(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:
    """The samples of the last steps were as old as they may be."""
    recent = steps[-RECENT:]
    stale = [seen.metrics.staleness or 0.0 for seen in recent]
    if bounds.max_staleness and len(recent) == RECENT and min(stale) >= NEAR_BOUND * bounds.max_staleness:
        yield Advisory(
            recent[-1].metrics.step,
            "staleness_at_bound",
            f"the samples of {_span(recent)} were {fmean(stale):.2f} versions old on average, and may be "
            f"{bounds.max_staleness} (rollout.max_staleness)",
            "The engines make samples faster than the trainer takes them, so samples wait until they are as old as "
            "they may be. Lower rollout.max_staleness, or give the trainer some of the engines' hardware",
        )


def slow_engine(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:  # noqa: ARG001
    """An engine made the tokens of a request at less than half the speed of the others."""
    recent = steps[-RECENT:]
    totals: dict[str, Work] = {}
    for seen in recent if len(recent) == RECENT else ():
        for engine, work in seen.work.items():
            totals[engine] = totals.get(engine, Work()) + work
    busy = {engine: work.speed for engine, work in totals.items() if work.requests >= FEWEST_REQUESTS and work.speed}
    for engine, speed in busy.items():
        others = [other for name, other in busy.items() if name != engine]
        if others and speed < SLOW * median(others):
            yield Advisory(
                recent[-1].metrics.step,
                "slow_engine",
                f"engine {engine} made {speed:.3g} tokens/s of a request in {_span(recent)}, and the other engines "
                f"{median(others):.3g}",
                "Look at its log and at what else runs on its host or GPU. A step waits for its slowest engine, so "
                "start it again on another host, or run without it",
                engine,
            )


def samples_failed(steps: Sequence[Seen], bounds: Bounds) -> Iterator[Advisory]:  # noqa: ARG001
    """Samples of the last step failed."""
    last = steps[-1].metrics
    if last.samples_failed:
        named = "" if steps[-1].failed is None else "; {}: {}".format(*steps[-1].failed)
        total = last.samples_finished + last.samples_failed
        yield Advisory(
            last.step,
            "samples_failed",
            f"step {last.step}: {last.samples_failed} of {total} samples failed and were left out{named}",
            "samples/ has the reason of each, where `status` is 'failed'",
        )


Rule = Callable[[Sequence[Seen], Bounds], Iterator[Advisory]]
RULES: tuple[Rule, ...] = (no_signal, truncated, gap_rising, staleness_at_bound, slow_engine, samples_failed)


@dataclass(slots=True)
class Advisor:
    """Says each advisory once, until it has stopped and comes back: until RECENT steps went by without it."""

    bounds: Bounds
    steps: list[Seen] = field(default_factory=list)
    _work: Mapping[str, Work] = field(default_factory=dict, init=False)  # of each engine so far
    _last: dict[tuple[str, str | None], int] = field(default_factory=dict, init=False)  # seen, counted in steps

    def see(
        self, metrics: StepMetrics, work: Mapping[str, Work], failed: tuple[str, str] | None = None
    ) -> list[Advisory]:
        """Return what is new after one more training step.

        work: of each engine so far. failed: a sample that failed in the step, and why.
        """
        in_step = {engine: total - self._work.get(engine, Work()) for engine, total in work.items()}
        self._work = dict(work)
        self.steps.append(Seen(metrics, in_step, failed))
        found = [advisory for rule in RULES for advisory in rule(self.steps, self.bounds)]
        now, last = len(self.steps), self._last
        new = [one for one in found if now - last.get((one.kind, one.engine), -RECENT) > RECENT]
        last |= {(one.kind, one.engine): now for one in found}
        return new


def work_of(metrics: Metrics, engines: Iterable[str]) -> dict[str, Work]:
    """Return what each of the engines has done so far, as this process knows it."""
    spans = {engine: metrics.request_spans.get(engine, Spans()) for engine in engines}
    return {engine: Work(one.count, metrics.output_tokens[engine], one.seconds) for engine, one in spans.items()}


def _span(steps: Sequence[Seen]) -> str:
    first, last = steps[0].metrics.step, steps[-1].metrics.step
    return f"step {last}" if first == last else f"steps {first} to {last}"
