"""One fleet for several trainer ranks: rank 0 owns it, the others follow it, and each rank sends its own requests.

Rank 0 does what must happen once. What the ranks must do together is a collective in the trainer's thread.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import ParamSpec, TypeVar

import torch

from millrace.config import RunConfig
from millrace.config.models import PublishConfig
from millrace.errors import ConfigError
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.rollout.sample import SampleStatus
from millrace.rollout.scheduler import SampleCounts
from millrace.train.metrics import StepMetrics
from millrace.train.world import World
from millrace.types import MemoryTag
from millrace.weights.sharded import ShardedTensors, follow, leading

P = ParamSpec("P")
R = TypeVar("R")

SUMS = (
    "tokens_per_second", "tokens", "samples_finished", "samples_failed", "samples_aborted", "groups_dropped",
    "groups_with_signal", "tool_calls", "tool_errors", "grades", "grades_unread", "requests", "malformed_calls",
    "duplicated_tokens", "agents_failed",
)  # fmt: skip
MEANS = {  # and their weights
    "reward": "samples_finished", "staleness": "samples_finished", "grade": "grades", "branches": "samples_finished",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainerThread:
    """The thread for the trainer's work, so that the event loop can serve the rollouts meanwhile.

    It runs all collectives, too, so that they have the same order on all ranks.
    """

    pool: ThreadPoolExecutor

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in the thread, return its result, and raise its exceptions."""
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
    """Yield the fleet, which rank 0 starts, to all ranks. The ranks leave the block together.

    start: returns the context manager of the fleet; called on rank 0 only. seed: of the routing.
    """
    if world.rank > 0:
        url, key = (await thread.run(world.broadcast, b"")).decode().split()
        async with follow_fleet(url, key, event_log=event_log, seed=seed + world.rank) as follower:
            yield follower
            await thread.run(world.any, False)
        return
    async with start() as fleet:
        if world.size == 1:
            yield fleet
            return
        async with fleet.share(own_address()) as access:
            await thread.run(world.broadcast, f"{access.url} {access.key}".encode())
            yield fleet
            await thread.run(world.any, False)


def require_many_ranks(config: RunConfig) -> None:
    """Raise ConfigError if a run with this config needs a trainer of one rank."""
    if config.judges is not None:
        raise ConfigError("judges need a single trainer process: leave out torchrun or the judges")
    if config.router is not None:
        raise ConfigError("under torchrun every rank sends its own requests: leave out torchrun or router")


def own_address() -> str:
    """Return the address at which rank 0 serves the other ranks: loopback if all ranks are on one host."""
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return "127.0.0.1" if one_host else os.environ["MASTER_ADDR"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The operations of the ranks on the fleet. Every rank calls each of them, in the same order."""

    world: World
    thread: TrainerThread
    fleet: FleetClient

    @property
    def owned(self) -> Fleet | None:
        """The fleet on rank 0, which may change it; None on the other ranks."""
        return self.fleet if isinstance(self.fleet, Fleet) else None

    @property
    def prefix(self) -> str:
        """The prefix of this rank's sample ids, which must differ because engines get the requests of all ranks."""
        return f"rank{self.world.rank}-" if self.world.size > 1 else ""

    async def together(self) -> None:
        """Wait until all ranks have called this."""
        if self.world.size > 1:
            await self.thread.run(self.world.any, False)

    async def sleep(self, *, interrupt: bool = False) -> None:
        """Put the fleet to sleep: after all ranks have their samples, and before any of them trains.

        interrupt: as in `Fleet.sleep`.
        """
        await self.together()
        if self.owned is not None:
            await self.owned.sleep(interrupt=interrupt)
        await self.together()

    async def wake(self, what: frozenset[MemoryTag]) -> None:
        """Wake these parts of the engines' memory."""
        if self.owned is not None:
            await self.owned.wake(what)

    async def publish_together(
        self, weights: Callable[[], ShardedTensors], version: int, config: PublishConfig
    ) -> None:
        """Publish a weight version. All ranks gather each tensor together. Raises PublishError.

        A single rank passes `weights` itself, so the fleet can call it again when an engine has lost its weights. With
        several ranks it can't, because all of them would have to join.
        """
        if self.owned is None:
            await self.thread.run(follow, weights())
            return
        with leading(weights(), self.owned.dtypes) if self.world.size > 1 else nullcontext(weights) as source:
            await self.owned.publish(
                source,
                version,
                bucket_bytes=config.bucket_bytes,
                deadline=config.timeout,
                require_finite=config.require_finite,
            )

    async def reached(self, version: int, *, deadline: float) -> None:
        """Wait until this rank sends its requests to engines of `version` or later, for at most `deadline` seconds."""
        if self.owned is None:
            await self.fleet.reached(version, deadline=deadline)

    async def largest(self, number: int) -> int:
        """Return the largest number of all ranks."""
        if self.world.size == 1:
            return number
        largest = await self.thread.run(self.world.max, torch.tensor(float(number), device=self.world.device))
        return int(largest.item())

    async def sums(self, *values: float) -> list[float]:
        """Return the sum of each value over all ranks."""
        summed = await self.thread.run(self.world.sum, torch.tensor(values, dtype=torch.float64))
        return [float(value) for value in summed.tolist()]

    async def over_all(self, metrics: StepMetrics) -> StepMetrics:
        """Return a step's metrics combined over all ranks; the seconds are this rank's."""
        if self.world.size == 1:
            return metrics
        weighted = [(getattr(metrics, name) or 0.0) * getattr(metrics, over) for name, over in MEANS.items()]
        parts = [value * metrics.samples_finished for value in metrics.rewards.values()]
        ends = list(metrics.ends.values())
        summed = await self.sums(*(getattr(metrics, name) for name in SUMS), *weighted, *ends, *parts)
        counted = {name: type(getattr(metrics, name))(value) for name, value in zip(SUMS, summed, strict=False)}
        combined = asdict(metrics) | counted
        for (name, over), value in zip(MEANS.items(), summed[len(SUMS) :], strict=False):
            combined[name] = value / combined[over] if combined[over] else None
        means = [value / (combined["samples_finished"] or 1) for value in summed[len(summed) - len(parts) :]]
        combined["rewards"] = dict(zip(metrics.rewards, means, strict=True))
        counts = summed[len(SUMS) + len(MEANS) :]
        combined["ends"] = {end: int(count) for end, count in zip(metrics.ends, counts, strict=False)}
        return StepMetrics(**combined)

    async def counts(self, counts: SampleCounts) -> SampleCounts:
        """Return the sample counts of all ranks together."""
        asked, *ended = await self.sums(counts.asked, *(counts.ended[status] for status in SampleStatus))
        total = SampleCounts(int(asked))
        total.ended.update({status: int(count) for status, count in zip(SampleStatus, ended, strict=True)})
        return total
