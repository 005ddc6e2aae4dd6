"""The groups of a step: the first complete ones, within the bounds of the pace, each used once."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import RolloutError
from millrace.rollout.buffer import RolloutBatch, RolloutBuffer, StalenessPolicy, has_signal
from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.staleness import leaves_room, staleness
from millrace.types import VersionSpan

PROBLEMS = [Problem.of_question(str(i), f"question {i}", str(i)) for i in range(7)]


@dataclass(slots=True)
class Drawn:
    """A runner whose samples take a drawn number of turns of the event loop, and end in a drawn way."""

    seed: int
    failing: float = 0.1
    version: int = 0
    asked: Counter[str] = field(default_factory=Counter)

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        self.asked[sample_id] += 1
        draw, began_at = random.Random(f"{self.seed}/{sample_id}"), self.version
        for _ in range(draw.randrange(60)):
            await asyncio.sleep(0)
        if draw.random() < self.failing:
            return Sample(sample_id, group_id, problem, SampleStatus.FAILED, None, 0.0, "drawn")
        one = np.ones(1, np.bool_), np.zeros(1, np.float32)
        episode = Episode((1,), *one, (VersionSpan(began_at, 0, 1),), turns=1, end=EpisodeEnd.ANSWERED)
        reward = float(draw.random() < 0.3)
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, episode, reward)

    def finish_group(self, samples: Sequence[Sample]) -> None:
        """They are complete."""


policies = st.builds(
    lambda groups, samples, staleness, ahead, extra, dropped: StalenessPolicy(
        groups, samples, staleness, min(ahead, staleness), extra, dropped
    ),
    *(st.integers(1, 4), st.integers(2, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)),
)


def ids(taken: list[RolloutBatch]) -> Counter[str]:
    return Counter(sample.sample_id for one in taken for sample in one.all_samples)


@given(policies, st.integers(0, 9), st.integers(1, 4))
@settings(deadline=None)
def test_no_group_is_started_that_no_step_takes(policy: StalenessPolicy, seed: int, count: int) -> None:
    async def steps() -> None:
        runner = Drawn(seed, failing=0.0)
        async with RolloutScheduler(runner, policy.samples_per_group) as scheduler:
            buffer = RolloutBuffer(scheduler, PROBLEMS, policy, seed=0, position=0, version=0, steps=count)
            for version in range(count):
                runner.version = version
                one = await buffer.take(version, lambda _: None)
                buffer.give_up_old(version + 1)
                assert len(one.groups) == policy.groups_per_step
            assert buffer.in_flight <= policy.extra

    asyncio.run(steps())


@given(policies, st.integers(0, 9), st.integers(0, 20))
@settings(deadline=None)
def test_every_step_is_full_fresh_and_new(policy: StalenessPolicy, seed: int, position: int) -> None:
    async def steps() -> None:
        runner, taken = Drawn(seed), list[RolloutBatch]()
        async with RolloutScheduler(runner, policy.samples_per_group) as scheduler:
            buffer = RolloutBuffer(scheduler, PROBLEMS, policy, seed=0, position=position, version=3)
            for version in range(3, 8):
                runner.version = version
                one = await buffer.take(version, lambda _: None)
                taken.append(one)
                buffer.give_up_old(version + 1)
                assert len(one.groups) == policy.groups_per_step
                assert len(one.dropped) <= policy.most_dropped
                assert all(staleness(group, version) <= policy.max_staleness for group in [*one.groups, *one.dropped])
                finished = [[s for s in g.samples if s.status is SampleStatus.FINISHED] for g in one.dropped]
                assert not any(map(has_signal, finished))
                assert {sample.status for sample in one.samples} == {SampleStatus.FINISHED}
                ahead = (policy.ahead + 1) * policy.groups_per_step + policy.extra - len(one.groups)
                assert 0 <= buffer.in_flight <= ahead
                # The ended samples and the running ones are all that were asked for.
                assert ids(taken).total() == scheduler.counts.asked - buffer.in_flight * policy.samples_per_group
                done = ids(taken).total() // policy.samples_per_group
                assert buffer.position == position + done
        assert set(ids(taken).values()) == {1}
        assert set(runner.asked.values()) == {1}

    asyncio.run(steps())


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 99))
@settings(deadline=None)
def test_no_group_is_given_up_because_it_is_slow(groups: int, ahead: int, seed: int) -> None:
    async def steps() -> None:
        policy = StalenessPolicy(groups, 2, max_staleness=ahead, ahead=ahead)
        runner = Drawn(seed, failing=0.0)
        async with RolloutScheduler(runner, 2) as scheduler:
            buffer = RolloutBuffer(scheduler, PROBLEMS, policy, seed=0, position=0, version=0)
            for version in range(8):
                runner.version = version
                one = await buffer.take(version, lambda _: None)
                buffer.give_up_old(version + 1)
                assert not one.discarded
                assert max(staleness(group, version) for group in one.groups) <= ahead

    asyncio.run(steps())


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_group_is_taken_only_if_the_others_can_be_taken_in_time(
    others: list[int], last: int, slots: int, groups: int
) -> None:
    """The rule is the same as trying to take all others, those with the least time first."""
    slots = min(slots, groups)
    sooner = sorted(other for other in others if other < last)
    room = [slots - 1, *[groups] * 5]
    for other in sooner:
        step = next((step for step, left in enumerate(room[: other + 1]) if left), None)
        if step is None:
            break
        room[step] -= 1
    else:
        assert leaves_room(last, others, 0, slots=slots, groups_per_step=groups)
        return
    assert not leaves_room(last, others, 0, slots=slots, groups_per_step=groups)


async def test_the_rest_of_a_step_is_given_up_unless_it_may_be_staler() -> None:
    for max_staleness in (0, 1):
        runner = Drawn(5, failing=0.0)
        policy = StalenessPolicy(1, 2, max_staleness=max_staleness, extra=3)
        async with RolloutScheduler(runner, 2) as scheduler:
            buffer = RolloutBuffer(scheduler, PROBLEMS, policy, seed=0, position=0, version=0)
            await buffer.take(0, lambda _: None)
            buffer.give_up_old(1)
            runner.version = 1
            rest = [await scheduler.next_group() for _ in range(3)]
        statuses = {sample.status for group in rest for sample in group.samples}
        assert (SampleStatus.ABORTED in statuses) == (max_staleness == 0)


async def test_a_step_in_which_everything_fails_ends_the_run() -> None:
    async with RolloutScheduler(Drawn(0, failing=1.1), 2) as scheduler:
        buffer = RolloutBuffer(scheduler, PROBLEMS, StalenessPolicy(2, 2), seed=0, position=0, version=0)
        with pytest.raises(RolloutError, match="all 4 samples of this step failed: drawn"):
            await buffer.take(0, lambda _: None)
