"""Groups that something completes after their samples have ended: each sample still ends once."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler

PROBLEM = Problem.of_question("p", "?", "1")
EPISODE = Episode((1,), np.ones(1, np.bool_), np.zeros(1, np.float32), (), turns=1, end=EpisodeEnd.ANSWERED)


@dataclass(slots=True)
class Rewarder:
    """A runner whose groups are rewarded once `go` is set; `begun` is set when one waits for it."""

    slow: bool = False
    error: Exception | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        if self.slow and sample_id.endswith("-0"):
            self.begun.set()
            await asyncio.Event().wait()
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, EPISODE, 0.0, rewards={"a": 0.0})

    def finish_group(self, samples: Sequence[Sample]) -> Coroutine[None, None, list[Sample]]:
        return self._finish(samples)

    async def _finish(self, samples: Sequence[Sample]) -> list[Sample]:
        self.begun.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return [replace(sample, reward=1.0) for sample in samples]


async def test_a_group_is_complete_when_it_is_rewarded() -> None:
    runner = Rewarder()
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler, asyncio.timeout(30):
        scheduler.start([("g", PROBLEM)], version=0)
        await runner.begun.wait()
        assert (scheduler.in_flight, scheduler.counts.ended.total()) == (1, 0)
        runner.go.set()
        group = await scheduler.next_group()
    assert [sample.reward for sample in group.samples] == [1.0, 1.0]
    assert scheduler.counts.ended == {SampleStatus.FINISHED: 2}


@pytest.mark.parametrize("slow", [False, True], ids=["in the reward", "before the reward"])
async def test_a_group_that_is_cancelled_before_it_has_its_reward_is_aborted(slow: bool) -> None:
    runner = Rewarder(slow)
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler, asyncio.timeout(30):
        scheduler.start([("g", PROBLEM)], version=0)
        await runner.begun.wait()
        assert scheduler.cancel_older_than(1) == 1
        group = await scheduler.next_group()
    for sample in group.samples:
        assert (sample.status, sample.episode, sample.rewards) == (SampleStatus.ABORTED, None, {})
        assert sample.reason == "cancelled: too old"
    assert scheduler.counts.ended == {SampleStatus.ABORTED: 2}


async def test_leaving_the_scheduler_waits_for_no_reward() -> None:
    runner = Rewarder()
    async with asyncio.timeout(30):
        async with RolloutScheduler(runner, samples_per_group=2) as scheduler:
            scheduler.start([("g", PROBLEM), ("h", PROBLEM)], version=0)
            await runner.begun.wait()
    assert scheduler.counts.asked == scheduler.counts.ended.total() == 4


async def test_what_a_reward_raises_ends_the_rollout() -> None:
    runner = Rewarder(error=RuntimeError("a bug"))
    runner.go.set()
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler, asyncio.timeout(30):
        scheduler.start([("g", PROBLEM)], version=0)
        with pytest.raises(RuntimeError, match="a bug"):
            await scheduler.next_group()
