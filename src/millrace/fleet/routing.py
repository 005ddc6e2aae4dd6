"""Which engine gets a request, and what its answer is of: pure policies over a snapshot of the fleet.

In this order: who may serve it (health, sleep, weight version); where its session was, or else its group; who has
computed the longest part of its prompt; who has the fewest tokens outstanding. Who is overloaded is passed over.
What an engine has computed is what its own KV cache events say, or else what was sent to it.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from millrace.engines.stock.kv_events import KVEvent
from millrace.fleet.prefixes import BLOCK_TOKENS, CachedPrefixes, prompt_blocks
from millrace.fleet.replica_state import ReplicaState, Snapshot
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext

SPILL = 2.0  # times what the least loaded would have with the request: who would have more is overloaded
PREFIX_SHARE = 0.5  # of a prompt; a known system prompt alone would draw everything to the first engine
MOST_HOMES = 65_536  # sessions and groups that are remembered
MOST_BLOCKS = 65_536


class Why(StrEnum):
    """What decided."""

    SESSION = "session"
    GROUP = "group"
    PREFIX = "prefix"
    LEAST_LOADED = "least_loaded"
    SPILL = "spill"  # the least loaded, since better places are overloaded


@dataclass(frozen=True, slots=True)
class Choice:
    engine: str
    why: Why


@dataclass(frozen=True, slots=True)
class _Place:
    """An engine, and which of its lives: what it had computed before `RoutingPolicy.forget` counts no more."""

    engine: str
    life: int


class RoutingPolicy:
    """Chooses, and remembers what it chose and was told: the same seed and the same calls give the same choices. Among
    equals the order is drawn from the seed, so that many ranks do not all begin with the same engine."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._homes: OrderedDict[tuple[Why, str], _Place] = OrderedDict()
        self._blocks: OrderedDict[int, dict[str, int]] = OrderedDict()  # of engines it was sent to, in which life
        self._cached = CachedPrefixes()  # of engines that tell
        self._lives: dict[str, int] = {}
        self._ranks: dict[str, int] = {}

    def choose(
        self,
        snapshot: Snapshot,
        outstanding: Mapping[str, int],
        request: GenerateRequest,
        routing: RoutingContext = ANYWHERE,
    ) -> Choice | None:
        """None where nobody may serve it. `outstanding`: of every engine, tokens of the requests that it has (prompts
        and room for output)."""
        engines = admissible(snapshot, routing)
        if not engines:
            return None
        need = len(request.input_ids) + request.sampling.max_new_tokens
        least = min(map(outstanding.__getitem__, engines))
        blocks: list[int] = []
        why = Why.LEAST_LOADED
        for affinity, engine in self._affine(request, routing, engines, outstanding, blocks):
            if outstanding[engine] + need <= SPILL * (least + need):
                return self._noted(Choice(engine, affinity), routing, self._unsaid(engines[engine], blocks))
            why = Why.SPILL
        idlest = min((engine for engine in engines if outstanding[engine] == least), key=self._rank)
        return self._noted(Choice(idlest, why), routing, self._unsaid(engines[idlest], blocks))

    def forget(self, engine: str) -> None:
        """The engine has lost what it had computed: by other weights, by sleep or by its end."""
        self._lives[engine] = self._lives.get(engine, 0) + 1
        self._cached.forget(engine)

    def follow(self, engine: str) -> None:
        """From now on the engine tells what it has computed (`learn`), and nothing else counts."""
        self.forget(engine)
        self._cached.begin(engine)

    def learn(self, engine: str, event: KVEvent) -> None:
        """What an engine that is followed has said."""
        self._cached.learn(engine, event)

    def missed(self, engine: str) -> None:
        """Something that the engine has said is lost, so that what it said before may hold no more."""
        self._cached.forget(engine)

    def unfollow(self, engine: str) -> None:
        """From now on what is sent to the engine counts."""
        self._cached.end(engine)

    def _affine(
        self,
        request: GenerateRequest,
        routing: RoutingContext,
        engines: Mapping[str, ReplicaState],
        outstanding: Mapping[str, int],
        blocks: list[int],
    ) -> Iterator[tuple[Why, str]]:
        """Where it should go, the best first. Fills `blocks` if it comes to them: hashing costs most of all."""
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
                told = self._cached.holders(blocks[index])
                there += [one for one in told if one in engines and engines[one].lora is None]
            if there:
                yield Why.PREFIX, min(there, key=lambda one: (outstanding[one], self._rank(one)))
                return

    def _unsaid(self, member: ReplicaState, blocks: list[int]) -> list[int]:
        """What is to be noted of a prompt that goes there. Engines that tell need none of it, but for requests with a
        published adapter: what they say is of the model without one."""
        return [] if member.lora is None and member.name in self._cached else blocks

    def _noted(self, choice: Choice, routing: RoutingContext, blocks: Sequence[int]) -> Choice:
        place = _Place(choice.engine, self._lives.get(choice.engine, 0))
        for key in _keys(routing):
            if choice.why is Why.SESSION and key[0] is Why.GROUP:  # the group's others may be elsewhere
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
    """The engines that may serve it: ready, awake, and at a version that it admits."""
    if routing.min_version is None and routing.exact_version is None:
        return snapshot.routable
    return {name: member for name, member in snapshot.routable.items() if routing.admits(member.version)}


def with_lora(made: Generation, version: int | None) -> Generation:
    """What came of a request that was sent with the adapter of `version`, whose engine names the weights below it. They
    are older than the adapter; newer ones came whole in the meantime, and took it off."""

    def maker(said: int | None) -> int | None:
        return version if said is None or version is None or said < version else said

    return replace(made, version_spans=tuple(replace(one, version=maker(one.version)) for one in made.version_spans))


def _keys(routing: RoutingContext) -> list[tuple[Why, str]]:
    named = ((Why.SESSION, routing.session), (Why.GROUP, routing.group))
    return [(why, name) for why, name in named if name is not None]
