"""A fleet as people see it, at one moment: the state of its engines, what each of them says that it does, and what
happened last."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.fleet.event_log import Entry, EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import Phase, ReplicaState
from millrace.types import EngineLoad, MemoryTag

ASK_DEADLINE = 2.0  # seconds; a scrape has 10 by default, and an engine that is alive takes milliseconds
FRESH_SECONDS = 0.5  # how long an answer is good for all who ask: rates over a shorter time are noise
SHOWN_EVENTS = 50


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine. `lag`: versions behind the newest; `load` is what the engine says, or `silence` why it says nothing.
    `cache_hit_share`: of all prompts' tokens so far."""

    name: str
    url: str
    state: Phase
    routable: bool
    version: int | None
    lag: int | None
    asleep: tuple[MemoryTag, ...]
    reason: str | None
    outstanding_tokens: int
    load: EngineLoad | None
    silence: str | None
    cache_hit_share: float | None
    restarts: int


@dataclass(frozen=True, slots=True)
class FleetView:
    """`at` is Unix time in seconds. No engines: they are being started. `events`: the newest come last."""

    at: float
    newest_version: int | None
    engines: tuple[EngineView, ...]
    events: tuple[Entry, ...]


class Observer:
    """Looks at the fleets of a run, the policy's and a judge's, for everybody who asks. They are added to `fleets` when
    their engines are there."""

    def __init__(self, event_log: EventLog) -> None:
        self.event_log = event_log
        self.fleets: tuple[Fleet, ...] = ()
        self._asking = asyncio.Lock()
        self._answers: Mapping[str, EngineLoad | str] = {}
        self._answered_at = 0.0

    async def look(self) -> FleetView:
        """Asks all engines at once, for at most ASK_DEADLINE, and none that has ended."""
        answers = await self._ask()
        newest = self.event_log.metrics.newest
        # After the answers: the state of now, with no wait between its parts.
        engines = [_view(state, fleet, self.event_log, answers) for fleet, state in self._states]
        return FleetView(time.time(), newest, tuple(engines), tuple(self.event_log.newest)[-SHOWN_EVENTS:])

    @property
    def _states(self) -> list[tuple[Fleet, ReplicaState]]:
        return [(fleet, state) for fleet in self.fleets for state in fleet.snapshot.replicas]

    async def _ask(self) -> Mapping[str, EngineLoad | str]:
        async with self._asking:
            if time.monotonic() - self._answered_at > FRESH_SECONDS:
                living = [(fleet, state.name) for fleet, state in self._states if state.phase is not Phase.DEAD]
                asked = [(name, fleet.engines[name]) for fleet, name in living if name in fleet.engines]
                answers = await asyncio.gather(*(load_of(engine) for _, engine in asked))
                self._answers = {name: answer for (name, _), answer in zip(asked, answers, strict=True)}
                self._answered_at = time.monotonic()
            return self._answers


async def load_of(engine: Engine) -> EngineLoad | str:
    """What the engine has to do, or why it does not say."""
    try:
        async with asyncio.timeout(ASK_DEADLINE):
            return await engine.loads()
    except TimeoutError:
        return f"no answer within {ASK_DEADLINE:g} s"
    except EngineError as error:
        return str(error).removeprefix(f"engine {error.engine}: ")


def _view(
    state: ReplicaState, fleet: Fleet, event_log: EventLog, answers: Mapping[str, EngineLoad | str]
) -> EngineView:
    answer = answers.get(state.name) if state.phase is not Phase.DEAD else None
    metrics = event_log.metrics
    newest = None if fleet.frozen else metrics.newest  # what is never published to does not lag
    return EngineView(
        name=state.name,
        url=state.url,
        state=state.phase,
        routable=state.routable,
        version=state.version,
        lag=newest - state.version if newest is not None and state.version is not None else None,
        asleep=tuple(sorted(state.asleep)) if state.phase is not Phase.DEAD else (),
        reason=state.reason,
        outstanding_tokens=fleet.outstanding.get(state.name, 0),
        load=answer if isinstance(answer, EngineLoad) else None,
        silence=answer if isinstance(answer, str) else None,
        cache_hit_share=metrics.cache_hit_share(state.name),
        restarts=metrics.restarts[state.name, True],
    )
