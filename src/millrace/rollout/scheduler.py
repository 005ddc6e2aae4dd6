"""Runs every sample as a task and returns groups in the order in which they complete, without a barrier."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.rollout.timings import Timings


class Runner(Protocol):
    """Runs one sample to its end, as `millrace.rollout.runner.SampleRunner` does."""

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        """Run a sample and return it. Exceptions end the whole rollout."""
        ...

    def finish_group(self, samples: Sequence[Sample]) -> Coroutine[None, None, list[Sample]] | None:
        """Return what completes the samples of a group, all of which have ended; None if they are complete."""
        ...


@dataclass(slots=True)
class _Running:
    """A group whose samples are running."""

    group_id: str
    problem: Problem
    version: int  # the trainer's when the group was started: none of its tokens is older
    tasks: list[asyncio.Task[Sample]]
    started_at: float = field(default_factory=time.time)
    finishing: asyncio.Task[list[Sample]] | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Cancel what runs, and what would begin later."""
        self.cancelled = True
        for task in (*self.tasks, *([self.finishing] if self.finishing is not None else [])):
            task.cancel()


@dataclass(slots=True)
class SampleCounts:
    """How many samples were started, and how many of them ended with each status."""

    asked: int = 0
    ended: Counter[SampleStatus] = field(default_factory=Counter)


class RolloutScheduler:
    """Starts groups of samples and returns them when they are complete.

    It is an async context manager. At its end, running samples are cancelled, and their requests are aborted on the
    engines.

    >>> async with RolloutScheduler(runner, samples_per_group=8) as scheduler:
    ...     scheduler.start([("group-0", problem)], version=1)
    ...     group = await scheduler.next_group()
    """

    def __init__(self, runner: Runner, samples_per_group: int) -> None:
        self.counts = SampleCounts()
        self._runner = runner
        self._samples_per_group = samples_per_group
        self._running: dict[str, _Running] = {}
        self._collectors: set[asyncio.Task[None]] = set()
        self._complete: asyncio.Queue[Group | BaseException] = asyncio.Queue()

    async def __aenter__(self) -> "RolloutScheduler":
        return self

    async def __aexit__(self, *_: object) -> None:
        collectors = list(self._collectors)
        for running in self._running.values():
            running.cancel()
        await asyncio.gather(*collectors, return_exceptions=True)

    @property
    def in_flight(self) -> int:
        """The number of groups that were started and not returned yet."""
        return len(self._running) + self._complete.qsize()

    def start(self, groups: Iterable[tuple[str, Problem]], version: int) -> None:
        """Start the samples of each (group id, problem).

        version: the weight version that the trainer has published last, for `cancel_older_than`.
        """
        for group_id, problem in groups:
            tasks = [
                asyncio.create_task(self._runner.run(f"{group_id}-{i}", group_id, problem))
                for i in range(self._samples_per_group)
            ]
            self.counts.asked += len(tasks)
            running = self._running[group_id] = _Running(group_id, problem, version, tasks)
            collector = asyncio.create_task(self._collect(running))
            self._collectors.add(collector)
            collector.add_done_callback(self._collectors.discard)

    async def next_group(self) -> Group:
        """Wait for the next complete group and return it.

        Raises the exception of a sample that raised one instead of ending, such as NoEngineError.
        """
        group = await self._complete.get()
        if isinstance(group, BaseException):
            raise group
        return group

    def cancel_older_than(self, version: int) -> int:
        """Cancel the groups that were started for a version before `version`, and return how many there are.

        `next_group` returns them with status ABORTED for unfinished samples.
        """
        old = [running for running in self._running.values() if running.version < version]
        for running in old:
            running.cancel()
        return len(old)

    async def _collect(self, running: _Running) -> None:
        try:
            samples = await _ended(running, self._runner)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            running.cancel()
            self._complete.put_nowait(error)
            return
        self.counts.ended.update(sample.status for sample in samples)
        del self._running[running.group_id]
        self._complete.put_nowait(Group(running.group_id, running.problem, tuple(samples)))


async def _ended(running: _Running, runner: Runner) -> list[Sample]:
    """Wait for the end of a group and return its samples. Raises what a sample raised instead of ending."""
    results = await asyncio.gather(*running.tasks, return_exceptions=True)
    samples = []
    for index, result in enumerate(results):
        if isinstance(result, asyncio.CancelledError):
            sample_id = f"{running.group_id}-{index}"
            timings = Timings(running.started_at, time.time() - running.started_at)
            problem, aborted = running.problem, SampleStatus.ABORTED
            result = _aborted(Sample(sample_id, running.group_id, problem, aborted, None, 0.0, timings=timings))
        elif isinstance(result, BaseException):
            raise result
        samples.append(result)
    rest = runner.finish_group(samples)
    if rest is None:
        return samples
    running.finishing = asyncio.create_task(rest)
    if running.cancelled:
        running.finishing.cancel()
    [finished] = await asyncio.gather(running.finishing, return_exceptions=True)
    if isinstance(finished, asyncio.CancelledError):
        return [_aborted(sample) if sample.status is SampleStatus.FINISHED else sample for sample in samples]
    if isinstance(finished, BaseException):
        raise finished
    return finished


def _aborted(sample: Sample) -> Sample:
    return replace(
        sample,
        status=SampleStatus.ABORTED,
        episode=None,
        branches=(),
        reward=0.0,
        rewards={},
        reason="cancelled: too old",
    )
