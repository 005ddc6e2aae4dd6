"""Several trainer ranks and one fleet: rank 0 owns it, the others follow, and each sends its own requests. What has to
happen once is done by rank 0, and what has to happen together is a collective in the trainer's thread."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import ParamSpec, TypeVar

import torch

from millrace.config.models import PublishConfig
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import Follower
from millrace.launch.ports import bound, url_of
from millrace.rollout.sample import SampleStatus
from millrace.rollout.scheduler import SampleCounts
from millrace.serve.owner import own
from millrace.train.record import StepMetrics
from millrace.train.world import World
from millrace.types import MemoryTag
from millrace.weights.sharded import ShardedTensors, follow, leading

P = ParamSpec("P")
R = TypeVar("R")

SUMS = (
    "tokens_per_second", "tokens", "samples_finished", "samples_failed", "samples_aborted", "groups_dropped",
    "groups_with_signal", "tool_calls", "tool_errors", "grades", "grades_unread",
)  # fmt: skip
MEANS = {"reward": "samples_finished", "staleness": "samples_finished", "grade": "grades"}  # and what they are over


@dataclass(frozen=True, slots=True)
class TrainerThread:
    """Where the trainer's work is done, so that the event loop goes on serving the rollouts; all collectives too, so
    that they come in one order."""

    pool: ThreadPoolExecutor

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: function(*args, **kwargs))


@asynccontextmanager
async def shared(
    world: World,
    thread: TrainerThread,
    start: Callable[[], AbstractAsyncContextManager[Fleet]],
    *,
    event_log: EventLog,
    seed: int,
) -> AsyncIterator[FleetClient]:
    """The fleet that rank 0 starts, for all ranks. They all come to the end of the block together."""
    if world.rank > 0:
        url, key = (await thread.run(world.broadcast, b"")).decode().split()
        async with Follower.open(url, key, event_log=event_log, seed=seed + world.rank) as follower:
            yield follower
            await thread.run(world.any, False)
        return
    async with start() as fleet:
        if world.size == 1:
            yield fleet
            return
        key = secrets.token_urlsafe(24)
        with bound(own_address(), 0) as sock:
            host, port = sock.getsockname()[:2]
            async with own(fleet.replicas, sock, key):
                await thread.run(world.broadcast, f"{url_of(host, port)} {key}".encode())
                yield fleet
                await thread.run(world.any, False)


def own_address() -> str:
    """Where rank 0 answers the others: on loopback, unless they are on several hosts."""
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return "127.0.0.1" if one_host else os.environ["MASTER_ADDR"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the ranks do to the fleet: each of them calls all of this, in the same order."""

    world: World
    thread: TrainerThread
    fleet: FleetClient

    @property
    def owned(self) -> Fleet | None:
        """The fleet, on the rank that may change it."""
        return self.fleet if isinstance(self.fleet, Fleet) else None

    @property
    def prefix(self) -> str:
        """Of the names of this rank's samples, since an engine gets the requests of all ranks."""
        return f"rank{self.world.rank}-" if self.world.size > 1 else ""

    async def together(self) -> None:
        """Waits for all ranks."""
        if self.world.size > 1:
            await self.thread.run(self.world.any, False)

    async def sleep(self, *, interrupt: bool = False) -> None:
        """The fleet sleeps when all ranks have what they asked for, and before any of them trains."""
        await self.together()
        if self.owned is not None:
            await self.owned.sleep(interrupt=interrupt)
        await self.together()

    async def wake(self, what: frozenset[MemoryTag]) -> None:
        if self.owned is not None:
            await self.owned.wake(what)

    async def publish_together(
        self, weights: Callable[[], ShardedTensors], version: int, config: PublishConfig
    ) -> None:
        """Brings a version to the engines, each tensor made whole by all ranks when its turn comes. Returns on the
        ranks that follow when they know of it, for which engines must be awake or be woken. A single process is asked
        for its weights again when an engine needs them; several ranks are not, since all of them would have to join."""
        if self.owned is None:
            await self.thread.run(follow, weights())
            return
        with leading(weights(), self.owned.dtypes) if self.world.size > 1 else nullcontext(weights) as whole:
            await self.owned.publish(
                whole,
                version,
                bucket_bytes=config.bucket_bytes,
                deadline=config.timeout,
                require_finite=config.require_finite,
            )

    async def reached(self, version: int, *, deadline: float) -> None:
        """Waits until this rank's requests get `version` or a later one."""
        if isinstance(self.fleet, Follower):
            await self.fleet.reached(version, deadline=deadline)

    async def sums(self, *values: float) -> list[float]:
        """Each of them over all ranks."""
        summed = await self.thread.run(self.world.sum, torch.tensor(values, dtype=torch.float64))
        return [float(value) for value in summed.tolist()]

    async def over_all(self, metrics: StepMetrics) -> StepMetrics:
        """The step's figures of all ranks; seconds are this rank's."""
        if self.world.size == 1:
            return metrics
        weighted = [(getattr(metrics, name) or 0.0) * getattr(metrics, over) for name, over in MEANS.items()]
        summed = await self.sums(*(getattr(metrics, name) for name in SUMS), *weighted)
        counted = {name: type(getattr(metrics, name))(value) for name, value in zip(SUMS, summed, strict=False)}
        whole = asdict(metrics) | counted
        for (name, over), value in zip(MEANS.items(), summed[len(SUMS) :], strict=True):
            whole[name] = value / whole[over] if whole[over] else None
        return StepMetrics(**whole)

    async def counts(self, counts: SampleCounts) -> SampleCounts:
        """Of all ranks."""
        asked, *ended = await self.sums(counts.asked, *(counts.ended[status] for status in SampleStatus))
        whole = SampleCounts(int(asked))
        whole.ended.update({status: int(count) for status, count in zip(SampleStatus, ended, strict=True)})
        return whole
