"""What must hold of a fleet to which anything happens.

Invariant 2: a server is routable only while it holds a committed version that was attested. Invariant 3: no generation
mixes versions without its version spans saying so; no prefix computed by one version is reused by another. Both are
checked by tokens: what every routable engine makes, a server makes that was started from that version's own folder.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import pytest
import torch

from millrace.errors import NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import ReplicaState
from millrace.types import Capability, FinishReason, Generation, VersionSpan
from millrace.weights.store import VersionStore
from tests.weights.variants import LONG, PROMPTS, SHORT, Prompt, Tokens, Variant, greedy, greedy_request

PATIENCE = 60.0  # seconds for what must come


class Fate(StrEnum):
    """How an engine stands."""

    SERVING = "serving"
    EMPTY = "empty"  # it serves after the next publish
    OUT = "out"  # only a restart brings it back


Fates = Mapping[str, set[Fate]]  # those that an engine may have


def fate(state: ReplicaState) -> Fate:
    if state.routable:
        return Fate.SERVING
    return Fate.EMPTY if state.usable else Fate.OUT


class Truth:
    """Of one fleet. `published` is what serves, `variant` its weights, `fates` how its engines stand. `spoiled`: what
    is kept of it was damaged. `steps_back`: an update can be undone; `attests`: what is loaded is compared with what
    was sent."""

    def __init__(self, fleet: Fleet, variants: Sequence[Variant], references: Sequence[Tokens]) -> None:
        self.fleet, self.variants, self._references = fleet, variants, references
        self.fates = dict.fromkeys(fleet.engines, Fate.SERVING)
        self.published, self.variant, self.spoiled = 0, 0, False
        self._weights = {0: 0}  # the variant of each version that was committed
        self._numbers = itertools.count()
        infos = [replica.info for replica in fleet.replicas.by_name.values()]
        self.steps_back = all(Capability.ROLLBACK in info.capabilities for info in infos)
        sums = {Capability.CHECKSUMS, Capability.SAMPLED_CHECKSUMS}
        self.attests = all(sums & info.capabilities for info in infos)

    def took(self, version: int, variant: int) -> None:
        self.published, self.variant, self.spoiled = version, variant, False
        self._weights[version] = variant

    def now(self, expected: Fates) -> None:
        """The engines stand in one of the ways that they may."""
        for name, fates in expected.items():
            self.fates[name] = fate(self.fleet.snapshot.get(name))
            assert self.fates[name] in fates, (name, fates, self.fleet.snapshot.describe())

    def next_variant(self) -> int:
        """Not what serves, and not always the same: an attempt that failed must not leave its weights behind."""
        others = [variant for variant in range(len(self.variants)) if variant != self.variant]
        return others[next(self._numbers) % len(others)]

    def name(self) -> str:
        return f"request-{next(self._numbers)}"

    # What is expected

    @property
    def usable(self) -> list[str]:
        return [name for name, found in self.fates.items() if found is not Fate.OUT]

    def others(self, name: str) -> list[str]:
        return [other for other in self.usable if other != name]

    def unchanged(self) -> dict[str, set[Fate]]:
        return {name: {found} for name, found in self.fates.items()}

    def served(self, lost: set[str]) -> dict[str, set[Fate]]:
        """All that were usable have the new version, but those."""
        left = {Fate.OUT}, {Fate.SERVING}
        return {name: left[name in self.usable and name not in lost] for name in self.fates}

    def given_up(self) -> dict[str, set[Fate]]:
        """Nobody has the new version. Who can't undo what reached it waits for the next."""
        also = set() if self.steps_back else {Fate.EMPTY}
        return {name: {found} | (also if found is Fate.SERVING else set()) for name, found in self.fates.items()}

    # What must hold

    async def check(self) -> None:
        """Every routable engine has the published version, and makes its tokens; so does the fleet."""
        states = self.fleet.snapshot.replicas
        assert {state.name: fate(state) for state in states} == self.fates, self.fleet.snapshot.describe()
        for state in states:
            assert state.version == (self.published if state.routable else None)
            assert state.usable or state.reason
        serving = [self.fleet.engines[state.name] for state in states if state.routable]
        asked = [(engine, prompt) for engine in serving for prompt in PROMPTS]
        answers = await asyncio.gather(*(greedy(engine, prompt, self.name(), SHORT) for engine, prompt in asked))
        for (engine, prompt), answer in zip(asked, answers, strict=True):
            self._check_answer(engine.name, prompt, answer)
        assert {(await engine.info()).weight_version for engine in serving} <= {self.published}
        for prompt in PROMPTS:
            request = greedy_request(prompt, self.name(), SHORT)
            if serving:
                self._check_answer("the fleet", prompt, await self.fleet.generate(request, deadline=PATIENCE))
            else:
                with pytest.raises(NoEngineError):
                    await self.fleet.generate(request, deadline=0.1)

    def _check_answer(self, who: str, prompt: Prompt, answer: Generation) -> None:
        expected = self._references[self.variant][prompt][:SHORT]
        makers = [
            variant for variant, tokens in enumerate(self._references) if tokens[prompt][:SHORT] == answer.output_ids
        ]
        assert answer.output_ids == expected, (
            f"{who} serves variant {makers}, version {self.published} is {self.variant}"
        )
        assert answer.version_spans == (VersionSpan(self.published, 0, SHORT),), who

    async def check_generation(self, prompt: Prompt, made: Generation, versions: set[int]) -> None:
        """Made while something happened: its first version span, and where the KV cache is computed again the others
        too, are the work of the versions that they name."""
        assert made.finish_reason is FinishReason.LENGTH
        assert len(made.output_ids) == LONG
        ends = [0, *(span.end for span in made.version_spans)]
        assert [span.start for span in made.version_spans] == ends[:-1]
        assert ends[-1] == LONG
        assert {span.version for span in made.version_spans} <= versions, made.version_spans
        first, *later = made.version_spans
        assert first.version is not None
        expected = self._references[self._weights[first.version]][prompt][: first.end]
        assert made.output_ids[: first.end] == expected, (
            f"not the tokens of version {first.version}: {made.version_spans}"
        )
        serving = [name for name, found in self.fates.items() if found is Fate.SERVING]
        for span in later:
            if span.version == self.published and serving and not self.steps_back:
                engine = self.fleet.engines[serving[0]]
                rest = await greedy(engine, prompt + made.output_ids[: span.start], self.name(), span.end - span.start)
                assert made.output_ids[span.start : span.end] == rest.output_ids, made.version_spans


def require_kept(folder: Path, truth: Truth) -> None:
    """What serves is what is kept, where it was not damaged."""
    if truth.published and not truth.spoiled:
        variant = truth.variants[truth.variant]
        store = VersionStore(str(folder), variant.folder, keep=2)
        assert store.versions[-1] == truth.published
        held = dict(store.tensors(truth.published))
        assert held.keys() == dict(variant.tensors).keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in variant.tensors)
        store.close()
