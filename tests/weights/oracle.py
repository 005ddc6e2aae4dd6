"""An oracle for fault tests: it knows what a fleet must serve and in which states its engines may be.

Invariant 2: a server is routable only while it holds a committed version that was attested. Invariant 3: no generation
mixes versions without its version spans saying so; no prefix computed by one version is reused by another. The oracle
checks both by tokens. Every routable engine must make the same tokens as a server that was started from the folder of
that version.
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

TIMEOUT = 60.0  # seconds to wait for an event that must come


class Status(StrEnum):
    """The state of an engine, as far as routing goes."""

    SERVING = "serving"
    EMPTY = "empty"  # it has no weights to serve, and serves after the next publish
    OUT = "out"  # only a restart brings it back


Statuses = Mapping[str, set[Status]]  # by the engine's name, every status that it may have


def status_of(state: ReplicaState) -> Status:
    if state.routable:
        return Status.SERVING
    return Status.EMPTY if state.usable else Status.OUT


class Oracle:
    """The expected state of one fleet.

    `published` is the version that the fleet serves, `variant` the index of its weights, and `statuses` the status of
    each engine. `store_corrupted` says that the stored copy of the version was damaged. `can_roll_back` says that the
    engines can undo an update."""

    def __init__(self, fleet: Fleet, variants: Sequence[Variant], references: Sequence[Tokens]) -> None:
        self.fleet, self.variants, self._references = fleet, variants, references
        self.statuses = dict.fromkeys(fleet.engines, Status.SERVING)
        self.published, self.variant, self.store_corrupted = 0, 0, False
        self._weights = {0: 0}  # the variant of each version that was committed
        self._numbers = itertools.count()
        infos = [replica.info for replica in fleet.replicas.by_name.values()]
        self.can_roll_back = all(Capability.ROLLBACK in info.capabilities for info in infos)
        sums = {Capability.CHECKSUMS, Capability.SAMPLED_CHECKSUMS}
        self._makes_sums = all(sums & info.capabilities for info in infos)
        self._by_loader = any(info.kind == "sglang" for info in infos)

    def attests(self, transport: str) -> bool:
        """Whether engines compare weights that come by this transport. SGLang's weight loader does not read folders."""
        return self._makes_sums and not (self._by_loader and transport == "disk")

    def record_publish(self, version: int, variant: int) -> None:
        self.published, self.variant, self.store_corrupted = version, variant, False
        self._weights[version] = variant

    def observe(self, expected: Statuses) -> None:
        """Requires that each engine has one of its expected statuses, and records it."""
        for name, statuses in expected.items():
            self.statuses[name] = status_of(self.fleet.snapshot.get(name))
            assert self.statuses[name] in statuses, (name, statuses, self.fleet.snapshot.describe())

    def next_variant(self) -> int:
        """Returns a variant that is not served. It changes from call to call, so that the weights of a failed attempt
        would be noticed."""
        others = [variant for variant in range(len(self.variants)) if variant != self.variant]
        return others[next(self._numbers) % len(others)]

    def name(self) -> str:
        return f"request-{next(self._numbers)}"

    # The expected statuses after a step

    @property
    def usable(self) -> list[str]:
        return [name for name, found in self.statuses.items() if found is not Status.OUT]

    def others(self, name: str) -> list[str]:
        return [other for other in self.usable if other != name]

    def unchanged(self) -> dict[str, set[Status]]:
        return {name: {found} for name, found in self.statuses.items()}

    def after_publish(self, lost: set[str]) -> dict[str, set[Status]]:
        """Every engine that was usable serves the new version, except the `lost` ones."""
        left = {Status.OUT}, {Status.SERVING}
        return {name: left[name in self.usable and name not in lost] for name in self.statuses}

    def after_failed_publish(self) -> dict[str, set[Status]]:
        """No engine has the new version. An engine that can't roll back waits for the next publish."""
        also = set() if self.can_roll_back else {Status.EMPTY}
        return {name: {found} | (also if found is Status.SERVING else set()) for name, found in self.statuses.items()}

    # Checks

    async def check(self) -> None:
        """Every routable engine has the published version and makes its tokens. So does the fleet."""
        states = self.fleet.snapshot.replicas
        assert {state.name: status_of(state) for state in states} == self.statuses, self.fleet.snapshot.describe()
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
                self._check_answer("the fleet", prompt, await self.fleet.generate(request, deadline=TIMEOUT))
            else:
                with pytest.raises(NoEngineError):
                    await self.fleet.generate(request, deadline=0.1)

    def _check_answer(self, source: str, prompt: Prompt, answer: Generation) -> None:
        expected = self._references[self.variant][prompt][:SHORT]
        makers = [
            variant for variant, tokens in enumerate(self._references) if tokens[prompt][:SHORT] == answer.output_ids
        ]
        assert answer.output_ids == expected, (
            f"{source} serves variant {makers}, version {self.published} is {self.variant}"
        )
        assert answer.version_spans == (VersionSpan(self.published, 0, SHORT),), source

    async def check_generation(self, prompt: Prompt, made: Generation, versions: set[int]) -> None:
        """Checks a generation that ran during a step. The tokens of its first version span must come from the version
        that the span names. So must those of later spans, where the engine recomputes the KV cache after an update."""
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
        serving = [name for name, found in self.statuses.items() if found is Status.SERVING]
        for span in later:
            if span.version == self.published and serving and not self.can_roll_back:
                engine = self.fleet.engines[serving[0]]
                rest = await greedy(engine, prompt + made.output_ids[: span.start], self.name(), span.end - span.start)
                assert made.output_ids[span.start : span.end] == rest.output_ids, made.version_spans


def check_store(folder: Path, oracle: Oracle) -> None:
    """The store must hold the weights that the fleet serves, unless a step corrupted it."""
    if oracle.published and not oracle.store_corrupted:
        variant = oracle.variants[oracle.variant]
        store = VersionStore(str(folder), variant.folder, keep=2)
        assert store.versions[-1] == oracle.published
        held = dict(store.tensors(oracle.published))
        assert held.keys() == dict(variant.tensors).keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in variant.tensors)
        store.close()
