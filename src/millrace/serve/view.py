"""The view of a fleet at one moment: the states and loads of its engines, and the latest events."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.fleet.autoscaler import FleetSize
from millrace.fleet.event_log import Entry, EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import Phase, ReplicaState
from millrace.types import EngineLoad, MemoryTag

ASK_DEADLINE = 2.0  # seconds; a Prometheus scrape has 10 by default, and a healthy engine takes milliseconds
FRESH_SECONDS = 0.5  # how long answers are reused: rates over a shorter time are noise
SHOWN_EVENTS = 50


@dataclass(frozen=True, slots=True)
class EngineView:
    """The view of one engine.

    version: the weight version that it serves. label: the trainer's own name for this version. lag: how many versions
    it is behind the newest. asleep: the parts of its memory that are released. reason: why it is in this state.
    outstanding_tokens: prompt tokens and maximum output tokens of the requests in flight. load: as the engine reports
    it; None if it did not answer, and `silence` says why. cache_hit_share: the share of all prompt tokens so far that
    were in the prefix cache. headroom_tokens: of its KV cache, the tokens that stay free at the fullest moment of its
    requests, as forecast (docs/routing.md).
    """

    name: str
    url: str
    state: Phase
    routable: bool
    version: int | None
    label: str | int | None
    lag: int | None
    asleep: tuple[MemoryTag, ...]
    reason: str | None
    outstanding_tokens: int
    load: EngineLoad | None
    silence: str | None
    cache_hit_share: float | None
    restarts: int
    headroom_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TrainingView:
    """The figures of a trainer's last step. Those that are None are not shown.

    accuracy: of the last evaluation. reward, rewards: means of the reward and of its parts. staleness: in versions.
    logprob_gap: mean difference of the engine's and the trainer's logprobs, in nats. seconds: of the step, by phase.
    samples: how many ended since the process began, by status.
    """

    step: int
    accuracy: float | None = None
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    staleness: float | None = None
    loss: float | None = None
    kl: float | None = None
    clip_fraction: float | None = None
    entropy: float | None = None
    logprob_gap: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FleetView:
    """The view of a fleet.

    at: Unix time in seconds. engines: empty while they are being started. events: the newest come last. waiting:
    requests that wait for room on an engine, or for the first engine. size: the number of engines, of all fleets
    together; None while they are being opened. training: of the trainer's last step, if there is a trainer that says.
    """

    at: float
    newest_version: int | None
    engines: tuple[EngineView, ...]
    events: tuple[Entry, ...]
    waiting: int = 0
    size: FleetSize | None = None
    training: TrainingView | None = None


class Observer:
    """Creates views of the fleets of a run: the policy's and a judge's.

    A fleet is added to `fleets` when its engines have started. A trainer sets `training` after each step.
    """

    def __init__(self, event_log: EventLog) -> None:
        self.event_log = event_log
        self.fleets: tuple[Fleet, ...] = ()
        self.training: TrainingView | None = None
        self._asking = asyncio.Lock()
        self._answers: Mapping[str, EngineLoad | str] = {}
        self._answered_at = 0.0

    async def look(self) -> FleetView:
        """Return a view of all engines. Queries those that run at the same time, for at most ASK_DEADLINE seconds."""
        answers = await self._ask()
        newest = self.event_log.metrics.newest
        # There is no await after the answers, so that the parts of the view belong to the same moment.
        engines = [
            _view(state, fleet, self.event_log, answers, headroom.get(state.name))
            for fleet in self.fleets
            for headroom in (fleet.headroom,)
            for state in fleet.snapshot.replicas
        ]
        waiting = sum(fleet.demand for fleet in self.fleets)
        sizes = [fleet.size for fleet in self.fleets]
        size = FleetSize(
            sum(one.wanted for one in sizes), sum(one.serving for one in sizes), sum(one.starting for one in sizes)
        )
        events = tuple(self.event_log.newest)[-SHOWN_EVENTS:]
        return FleetView(time.time(), newest, tuple(engines), events, waiting, size if sizes else None, self.training)

    @property
    def _states(self) -> list[tuple[Fleet, ReplicaState]]:
        return [(fleet, state) for fleet in self.fleets for state in fleet.snapshot.replicas]

    async def _ask(self) -> Mapping[str, EngineLoad | str]:
        async with self._asking:
            if time.monotonic() - self._answered_at > FRESH_SECONDS:
                living = [(fleet, state.name) for fleet, state in self._states if state.phase is not Phase.DEAD]
                queried = [(name, fleet.engines[name]) for fleet, name in living if name in fleet.engines]
                answers = await asyncio.gather(*(load_of(engine) for _, engine in queried))
                self._answers = {name: answer for (name, _), answer in zip(queried, answers, strict=True)}
                self._answered_at = time.monotonic()
            return self._answers


async def load_of(engine: Engine) -> EngineLoad | str:
    """Return an engine's load, or the reason why it did not answer."""
    try:
        async with asyncio.timeout(ASK_DEADLINE):
            return await engine.loads()
    except TimeoutError:
        return f"no answer within {ASK_DEADLINE:g} s"
    except EngineError as error:
        return str(error).removeprefix(f"engine {error.engine}: ")


def _view(
    state: ReplicaState,
    fleet: Fleet,
    event_log: EventLog,
    answers: Mapping[str, EngineLoad | str],
    headroom: int | None,
) -> EngineView:
    answer = answers.get(state.name) if state.phase is not Phase.DEAD else None
    metrics = event_log.metrics
    newest = None if fleet.frozen else metrics.newest  # a frozen fleet gets no versions, so it does not lag
    return EngineView(
        name=state.name,
        url=state.url,
        state=state.phase,
        routable=state.routable,
        version=state.version,
        label=None if state.version is None else fleet.labels.get(state.version),
        lag=newest - state.version if newest is not None and state.version is not None else None,
        asleep=tuple(sorted(state.asleep)) if state.phase is not Phase.DEAD else (),
        reason=state.reason,
        outstanding_tokens=fleet.outstanding.get(state.name, 0),
        load=answer if isinstance(answer, EngineLoad) else None,
        silence=answer if isinstance(answer, str) else None,
        cache_hit_share=metrics.cache_hit_share(state.name),
        restarts=metrics.restarts[state.name, True],
        headroom_tokens=headroom if state.phase is not Phase.DEAD else None,
    )
