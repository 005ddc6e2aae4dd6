"""Several servers that are one engine: prefill servers compute the prompts, and decode servers generate.

How one request travels is in `prefill.py` of each kind. Every control call reaches all servers, and a version is
committed when all hold it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import random
from typing import Any, Literal, NoReturn, TypeVar

from millrace.buckets import Bucket, CudaIpcBucket, ProcessGroup
from millrace.engines.audit import HeldLayer, WeightSample
from millrace.engines.http_engine import HttpEngine
from millrace.engines.stock.engine import StockEngine
from millrace.errors import EngineFailed, EngineRefused
from millrace.http import HttpClient
from millrace.types import (
    ALL_MEMORY,
    Capability,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
)

T = TypeVar("T")
Stock = StockEngine[Any]  # of one kind: SGLang or vLLM
Role = Literal["decode", "prefill"]
# What the servers can do one by one, and not as one engine.
LACKING = {Capability.PAUSE_KEEP, Capability.LORA, Capability.UPDATE_FROM_PARTS, Capability.SENT_PARTS}
# From the best to the worst. The engine is in the worst state of its servers.
STATES = (Health.READY, Health.PAUSED, Health.ASLEEP, Health.UNKNOWN, Health.BUSY, Health.DEAD)


@dataclass(frozen=True, slots=True)
class Member:
    """The role, the address and the keys of one of the servers. The keys are secret and left out of the repr."""

    role: Role
    url: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


async def completed(*calls: Awaitable[T]) -> list[T]:
    """Run calls at the same time, and return their results. Raises the first error, after all have ended."""
    results = []
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


class PrefillDecodeEngine(HttpEngine):
    """Prefill and decode servers as one engine. Its ranks are those of the decode servers, then of the others."""

    def __init__(self, decodes: Sequence[Stock], prefills: Sequence[Stock]) -> None:
        first = decodes[0]
        super().__init__(first.name, first.url, api_key=first.api_key, admin_key=first.admin_key)
        self.decodes, self.prefills = tuple(decodes), tuple(prefills)
        self._running = dict.fromkeys(self.decodes, 0)
        self._ranks: Sequence[int] = ()  # of each server

    @property
    def servers(self) -> Sequence[Stock]:
        """All servers. Decode servers come first: while they take no requests, the others get none."""
        return (*self.decodes, *self.prefills)

    @property
    def members(self) -> Sequence[Member]:
        """The addresses of all servers, in the same order. The first one is that of the engine."""
        roles: dict[Role, Sequence[Stock]] = {"decode": self.decodes, "prefill": self.prefills}
        return [Member(role, one.url, one.api_key, one.admin_key) for role, of in roles.items() for one in of]

    async def initialize(self, version: int | None = None) -> None:
        await self._each(lambda server: server.initialize(version))
        self._ranks = [info.ranks for info in await self._each(lambda server: server.info())]

    async def close(self) -> None:
        await self._each(lambda server: server.close())
        await super().close()

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        with self._least_busy() as decode:
            return await decode.generate(request, deadline=deadline)

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        with self._least_busy() as decode:
            parts = decode.stream(request, deadline=deadline)
            try:
                async for part in parts:
                    yield part
            finally:
                await parts.aclose()

    async def generate_by(
        self,
        router: HttpClient,  # noqa: ARG002
        request: GenerateRequest,  # noqa: ARG002
        *,
        headers: Mapping[str, str],  # noqa: ARG002
        deadline: float,  # noqa: ARG002
    ) -> NoReturn:
        raise EngineRefused(self.name, "its requests can't go through a router")

    async def abort_by_router(self, request_id: str) -> None:
        await self.abort(request_id)

    async def abort(self, request_id: str | None = None) -> None:
        for decode in self.decodes:
            await decode.abort(request_id)

    async def pause(self, mode: PauseMode) -> None:
        if mode is PauseMode.KEEP:
            raise EngineRefused(self.name, "it can't keep requests half-way on two servers; pause by retract or abort")
        await self._in_turn(lambda server: server.pause(mode))

    async def resume(self) -> None:
        await self._in_turn(lambda server: server.resume(), backwards=True)

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        await self._in_turn(lambda server: server.flush_cache(deadline=deadline))

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._in_turn(lambda server: server.sleep(what))

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._in_turn(lambda server: server.wake(what), backwards=True)

    async def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        await self.decodes[0].check_tensors(shapes)

    async def begin_update(self, version: int) -> None:
        begun: list[Stock] = []

        async def begin(server: Stock) -> None:
            await server.begin_update(version)
            begun.append(server)

        try:
            await self._in_turn(begin)
        except BaseException:
            await asyncio.gather(*(server.rollback() for server in begun), return_exceptions=True)
            raise

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        shares = dict(zip(self.servers, shares_of(bucket, self._ranks), strict=True))
        await self._each(lambda server: server.load(shares[server], deadline=deadline))

    async def commit(self) -> None:
        await self._in_turn(lambda server: server.commit(), backwards=True)

    async def rollback(self) -> None:
        await self._each(lambda server: server.rollback())

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        offsets = dict(zip(self.servers, accumulate(self._ranks, initial=group.rank_offset), strict=False))
        await self._each(
            lambda server: server.join_group(replace(group, rank_offset=offsets[server]), deadline=deadline)
        )

    async def leave_group(self, name: str) -> None:
        await self._each(lambda server: server.leave_group(name))

    async def checksums(self) -> Mapping[str, str]:
        """Return the checksums of all servers. Names begin with the server's number, then the rank."""
        found = await self._each(lambda server: server.checksums())
        return {f"{number}.{name}": one for number, sums in enumerate(found) for name, one in sums.items()}

    async def sampled_checksums(self) -> Mapping[str, str]:
        first, *others = await self._each(lambda server: server.sampled_checksums())
        if any(other != first for other in others):
            raise EngineFailed(self.name, "its servers received different tensors")
        return first

    async def audit(
        self, samples: Sequence[WeightSample], *, deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]] | None:
        found = [one for one in await self._each(lambda server: server.audit(samples, deadline=deadline)) if one]
        if len(found) < len(self.servers):
            return None
        layers = [replace(one, layer=f"{n}.{one.layer}") for n, (held, _) in enumerate(found) for one in held]
        return layers, sorted({number for _, unplaced in found for number in unplaced})

    async def health(self, *, deadline: float = 5.0) -> Health:
        return max(await self._each(lambda server: server.health(deadline=deadline)), key=STATES.index)

    async def loads(self) -> EngineLoad:
        """Return the load of the decode servers. They also count the requests whose prompts are being computed."""
        found = await completed(*(decode.loads() for decode in self.decodes))
        return EngineLoad(
            running_requests=sum(one.running_requests for one in found),
            waiting_requests=sum(one.waiting_requests for one in found),
            used_tokens=sum(one.used_tokens for one in found),
            max_tokens=sum(one.max_tokens for one in found),
            tokens_per_second=sum(one.tokens_per_second for one in found),
        )

    async def info(self) -> EngineInfo:
        infos = await self._each(lambda server: server.info())
        decodes = infos[: len(self.decodes)]
        first, versions = infos[0], {info.weight_version for info in infos}
        return replace(
            first,
            weight_version=versions.pop() if len(versions) == 1 else None,
            capabilities=frozenset.intersection(*(info.capabilities for info in infos)) - LACKING,
            ranks=sum(info.ranks for info in infos),
            max_running=sum(info.max_running or 0 for info in decodes) or None,
            cache_tokens=sum(info.cache_tokens or 0 for info in decodes) or None,
        )

    @contextmanager
    def _least_busy(self) -> Iterator[Stock]:
        """Choose the decode server with the fewest requests, and count one more until the block ends."""
        decode = least(self.decodes, self._running.__getitem__)
        self._running[decode] += 1
        try:
            yield decode
        finally:
            self._running[decode] -= 1

    async def _each(self, call: Callable[[Stock], Awaitable[T]]) -> list[T]:
        """Make a call on all servers at the same time."""
        return await completed(*map(call, self.servers))

    async def _in_turn(self, call: Callable[[Stock], Awaitable[None]], *, backwards: bool = False) -> None:
        """Make a call on the decode servers, and then on the prefill servers, or the other way round."""
        groups: Sequence[Sequence[Stock]] = (self.decodes, self.prefills)
        for servers in reversed(groups) if backwards else groups:
            await completed(*map(call, servers))


def least(servers: Sequence[T], requests: Callable[[T], int]) -> T:
    """Return a server with the fewest requests, by chance if there are several: other processes choose too."""
    return min(servers, key=lambda one: (requests(one), random()))  # noqa: S311


def shares_of(bucket: Bucket, ranks: Sequence[int]) -> Sequence[Bucket]:
    """Return the bucket for each server. ranks: the number of each one's ranks.

    GPU memory has a handle for each rank. The other kinds of buckets are for any number of ranks.
    """
    if not isinstance(bucket, CudaIpcBucket):
        return [bucket] * len(ranks)
    ends = accumulate(ranks)
    return [replace(bucket, shares=bucket.shares[end - count : end]) for end, count in zip(ends, ranks, strict=True)]
