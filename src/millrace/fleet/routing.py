"""The routing policy: chooses the engine for a request from a snapshot of the fleet. No I/O.

Only engines that may serve the request are candidates (health, sleep, weight version). The policy prefers, in this
order: the engine of the request's session, the engine of its group, the engine that has computed the longest part of
its prompt, and the engine with the fewest outstanding tokens. It passes over overloaded engines. An engine's own KV
cache events say what it has computed; for an engine that sends no events, the policy remembers the prompts sent to it.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import StrEnum

from millrace.engines.stock.kv_events import KVEvent
from millrace.fleet.prefixes import BLOCK_TOKENS, CachedPrefixes, prompt_blocks
from millrace.fleet.replica_state import ReplicaState, Snapshot
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext

SPILL = 2.0  # times the tokens that the least loaded engine would have with the request; above that, one is overloaded
PREFIX_SHARE = 0.5  # of a prompt; otherwise a shared system prompt would draw all requests to one engine
MOST_HOMES = 65_536  # sessions and groups that are remembered
MOST_BLOCKS = 65_536  # blocks of prompts that are remembered


class Why(StrEnum):
    """The reason why an engine was chosen."""

    SESSION = "session"
    GROUP = "group"
    PREFIX = "prefix"
    LEAST_LOADED = "least_loaded"
    SPILL = "spill"  # the least loaded, since the preferred engines are overloaded


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine chosen for a request, and the reason."""

    engine: str
    why: Why


@dataclass(frozen=True, slots=True)
class _Place:
    """An engine in one of its lives. `RoutingPolicy.forget` ends a life: what was computed in it no longer counts."""

    engine: str
    life: int


class RoutingPolicy:
    """Chooses an engine for each request, and remembers its choices and the engines' KV cache events.

    The same seed and the same calls give the same choices. The seed also decides between equal engines, so that the
    ranks of a training job do not all start with the same engine.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._homes: OrderedDict[tuple[Why, str], _Place] = OrderedDict()
        self._blocks: OrderedDict[int, dict[str, int]] = (
            OrderedDict()
        )  # by hash: the engines that were sent the block, and their lives
        self._cached = CachedPrefixes()  # of engines that send KV cache events
        self._lives: dict[str, int] = {}
        self._ranks: dict[str, int] = {}

    def choose(
        self,
        snapshot: Snapshot,
        outstanding: Mapping[str, int],
        request: GenerateRequest,
        routing: RoutingContext = ANYWHERE,
        *,
        among: Set[str] | None = None,
    ) -> Choice | None:
        """Return the engine for the request, or None if no engine may serve it or it should wait for its session's.

        `outstanding`: by engine, the tokens of its running requests (prompts, and room for output). `among`: the
        engines that have room; by default all have.
        """
        engines = admissible(snapshot, routing)
        free = engines.keys() if among is None else engines.keys() & among
        if not free:
            return None
        need = len(request.input_ids) + request.sampling.max_new_tokens
        least = min(map(outstanding.__getitem__, free))
        blocks: list[int] = []
        why = Why.LEAST_LOADED
        for affinity, engine in self._affine(request, routing, engines, outstanding, blocks):
            if outstanding[engine] + need <= SPILL * (least + need):
                if engine in free:
                    return self._noted(Choice(engine, affinity), routing, self._unreported(engines[engine], blocks))
                if affinity is Why.SESSION:
                    return None
            why = Why.SPILL
        idlest = min((engine for engine in free if outstanding[engine] == least), key=self._rank)
        return self._noted(Choice(idlest, why), routing, self._unreported(engines[idlest], blocks))

    def home(self, routing: RoutingContext) -> str | None:
        """Return the engine that has the tokens of the request's session; None if none has."""
        home = None if routing.session is None else self._homes.get((Why.SESSION, routing.session))
        return home.engine if home is not None and home.life == self._lives.get(home.engine, 0) else None

    def forget(self, engine: str) -> None:
        """Record that the engine lost its KV cache: its weights changed, it fell asleep, or it ended."""
        self._lives[engine] = self._lives.get(engine, 0) + 1
        self._cached.forget(engine)

    def follow(self, engine: str) -> None:
        """Use the engine's KV cache events (`learn`) from now on, and not the prompts that are sent to it."""
        self.forget(engine)
        self._cached.begin(engine)

    def learn(self, engine: str, event: KVEvent) -> None:
        """Record a KV cache event of an engine that is followed."""
        self._cached.learn(engine, event)

    def missed(self, engine: str) -> None:
        """Record that an event of the engine was lost, so that earlier events may no longer hold."""
        self._cached.forget(engine)

    def unfollow(self, engine: str) -> None:
        """Use the prompts that are sent to the engine from now on, and not its KV cache events."""
        self._cached.end(engine)

    def _affine(
        self,
        request: GenerateRequest,
        routing: RoutingContext,
        engines: Mapping[str, ReplicaState],
        outstanding: Mapping[str, int],
        blocks: list[int],
    ) -> Iterator[tuple[Why, str]]:
        """Yield the preferred engines, best first. Fills `blocks` only if it needs them, since hashing is costly."""
        for key in _keys(routing):
            home = self._homes.get(key)
            if home is not None and home.engine in engines and home.life == self._lives.get(home.engine, 0):
                yield key[0], home.engine
        blocks.extend(prompt_blocks(request.input_ids))
        own_lora = "lora_path" in request.extra
        for index in range(len(blocks) - 1, -1, -1):
            if (index + 1) * BLOCK_TOKENS < PREFIX_SHARE * len(request.input_ids):
                return
            known = self._blocks.get(blocks[index], {})
            there = [one for one, life in known.items() if one in engines and life == self._lives.get(one, 0)]
            if not own_lora:
                holders = self._cached.holders(blocks[index])
                there += [one for one in holders if one in engines and engines[one].lora is None]
            if there:
                yield Why.PREFIX, min(there, key=lambda one: (outstanding[one], self._rank(one)))
                return

    def _unreported(self, state: ReplicaState, blocks: list[int]) -> list[int]:
        """Return the blocks of a prompt that the engine's own events will not report.

        Events cover the model without an adapter: requests with a published adapter are remembered here.
        """
        return [] if state.lora is None and state.name in self._cached else blocks

    def _noted(self, choice: Choice, routing: RoutingContext, blocks: Sequence[int]) -> Choice:
        place = _Place(choice.engine, self._lives.get(choice.engine, 0))
        for key in _keys(routing):
            if choice.why is Why.SESSION and key[0] is Why.GROUP:  # the rest of the group may run on another engine
                continue
            self._homes[key] = place
            self._homes.move_to_end(key)
        for block in blocks:
            self._blocks.setdefault(block, {})[place.engine] = place.life
            self._blocks.move_to_end(block)
        while len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)
        while len(self._blocks) > MOST_BLOCKS:
            self._blocks.popitem(last=False)
        return choice

    def _rank(self, engine: str) -> int:
        rank = self._ranks.get(engine)
        if rank is None:
            rank = self._ranks[engine] = zlib.crc32(f"{self._seed}/{engine}".encode())
        return rank


def admissible(snapshot: Snapshot, routing: RoutingContext) -> Mapping[str, ReplicaState]:
    """Return the engines that are ready, awake, and at a version that `routing` admits."""
    if routing.min_version is None and routing.exact_version is None:
        return snapshot.routable
    return {name: state for name, state in snapshot.routable.items() if routing.admits(state.version)}


def with_lora(made: Generation, version: int | None) -> Generation:
    """Return the generation with the version of its adapter, where the engine named the weights below the adapter.

    Those weights are older than the adapter. If the engine names newer ones, they were published whole in the
    meantime, which removed the adapter.
    """

    def actual(named: int | None) -> int | None:
        return version if named is None or version is None or named < version else named

    return replace(made, version_spans=tuple(replace(one, version=actual(one.version)) for one in made.version_spans))


def _keys(routing: RoutingContext) -> list[tuple[Why, str]]:
    named = ((Why.SESSION, routing.session), (Why.GROUP, routing.group))
    return [(why, name) for why, name in named if name is not None]
