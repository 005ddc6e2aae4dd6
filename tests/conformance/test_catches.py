"""Engines that break the contract in one way, and the checks that must fail on them. A check that can't fail proves
nothing."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from millrace.buckets import Bucket, DiskBucket
from millrace.conformance import Outcome, Runner, Subject, select
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.types import EngineInfo, GenerateRequest, Generation, Health, MemoryTag, PauseMode, VersionSpan
from tests.conformance.conftest import ADMIN_KEY, API_KEY, embedded_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with embedded_server(tiny_model, tmp_path_factory.mktemp("logs")) as url:
        yield url


class Honest(EmbeddedEngine):
    """Keeps the contract. The other classes each change one thing."""


class ShortOfOne(EmbeddedEngine):
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        room = max(request.sampling.max_new_tokens - 1, 1)
        shorter = replace(request, sampling=replace(request.sampling, max_new_tokens=room))
        return await super().generate(shorter, deadline=deadline)


class WrongSign(EmbeddedEngine):
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        made = await super().generate(request, deadline=deadline)
        return replace(made, logprobs=np.abs(made.logprobs))


class Greedy(EmbeddedEngine):
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        cold = replace(request, sampling=replace(request.sampling, temperature=0.0))
        return await super().generate(cold, deadline=deadline)


class Clamps(EmbeddedEngine):
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        known = tuple(max(0, min(token, 99)) for token in request.input_ids)
        return await super().generate(replace(request, input_ids=known), deadline=deadline)


class InOnePiece(EmbeddedEngine):
    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        yield await self.generate(request, deadline=deadline)


class AbortsAllAlike(EmbeddedEngine):
    async def abort(self, request_id: str | None = None) -> None:
        await self._control("/abort_request", {"rid": request_id} if request_id else {"abort_all": True})


class NeverPauses(EmbeddedEngine):
    async def pause(self, mode: PauseMode) -> None:
        return


class DeadWhenPaused(EmbeddedEngine):
    async def health(self, *, deadline: float = 5.0) -> Health:
        state = await super().health(deadline=deadline)
        return Health.DEAD if state is Health.PAUSED else state


class NeverFlushes(EmbeddedEngine):
    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        return


class SleepsAtOnce(EmbeddedEngine):
    """Says that it sleeps, but does not."""

    asleep = False

    async def sleep(self, what: frozenset[MemoryTag] = frozenset(MemoryTag)) -> None:
        self.asleep = True

    async def wake(self, what: frozenset[MemoryTag] = frozenset(MemoryTag)) -> None:
        self.asleep = False

    async def health(self, *, deadline: float = 5.0) -> Health:
        return Health.ASLEEP if self.asleep else await super().health(deadline=deadline)


class SleepsWithoutWaking(EmbeddedEngine):
    """Loses its first wake."""

    lost = False

    async def wake(self, what: frozenset[MemoryTag] = frozenset(MemoryTag)) -> None:
        if self.lost:
            await super().wake(what)
        self.lost = True


class EarlyVersion(EmbeddedEngine):
    async def info(self) -> EngineInfo:
        told = await super().info()
        return told if self._update is None else replace(told, weight_version=self._update)


class OtherWeights(EmbeddedEngine):
    """Loads its own folder, whatever it is given."""

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        await super().load(DiskBucket((await self.info()).model_path), deadline=deadline)


class OneSegment(EmbeddedEngine):
    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        async for made in super().stream(request, deadline=deadline):
            version = made.version_spans[-1].version
            yield replace(made, version_spans=(VersionSpan(version, 0, len(made.output_ids)),))


BROKEN: list[tuple[type[EmbeddedEngine], str]] = [
    (ShortOfOne, "generate.count"),
    (WrongSign, "generate.logprobs"),
    (Greedy, "generate.sampling"),
    (Clamps, "refuse.token_beyond_the_vocabulary"),
    (InOnePiece, "stream.cumulative"),
    (AbortsAllAlike, "abort.one"),
    (NeverPauses, "pause.abort"),
    (DeadWhenPaused, "pause.keep"),
    (NeverFlushes, "cache.flush"),
    (NeverFlushes, "cache.flush_waits"),
    (NeverFlushes, "cache.flush_deadline"),
    (SleepsAtOnce, "sleep.drains"),
    (SleepsAtOnce, "sleep.requests_wait"),
    (SleepsWithoutWaking, "sleep.kv_cache"),
    (EarlyVersion, "update.commit"),
    (OtherWeights, "update.disk"),
    (OneSegment, "version.across_pause"),
]


@pytest.mark.parametrize(("broken", "name"), BROKEN, ids=[f"{broken.__name__}-{name}" for broken, name in BROKEN])
async def test_a_broken_engine_is_found_out(
    url: str, tiny_model: Path, other_model: Path, broken: type[EmbeddedEngine], name: str
) -> None:
    (check,) = select(name)
    outcomes = []
    for kind in (Honest, broken):
        engine = kind(kind.__name__, url, api_key=API_KEY, admin_key=ADMIN_KEY)
        try:
            runner = Runner(Subject(engine, await engine.info(), tiny_model, other_model), deadline=20)
            outcomes.append((await runner.examine(check)).outcome)
            assert runner.lost is None
        finally:
            await engine.close()
    assert outcomes == [Outcome.PASSED, Outcome.FAILED]
