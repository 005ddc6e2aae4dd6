"""The training loop: take the groups that are complete, train on them, publish, go on.

Both modes are this one loop. `hybrid` lets no sample be stale, so the engines have nothing to do while the trainer
trains, and sleep. `standalone` lets them generate on, as far ahead as `max_staleness` allows.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from millrace.config.models import RunConfig
from millrace.errors import RolloutError
from millrace.rollout.data import problems_at
from millrace.rollout.runner import SampleRunner, ToolCounts, greedy
from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import Ledger, RolloutScheduler
from millrace.rollout.staleness import admissible_groups, staleness
from millrace.train import checkpoint
from millrace.train.batch import TrainSample
from millrace.train.display import Display
from millrace.train.loss import group_advantages
from millrace.train.record import RunFolder, StepMetrics
from millrace.train.trainer import StepStats, Trainer
from millrace.types import MemoryTag

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Progress:
    """Where a run stands; what a checkpoint keeps beside the tensors."""

    step: int = 0
    version: int = 0
    position: int = 0  # in the order of the training problems


@dataclass(slots=True)
class Stopwatch:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def add(self, other: "Stopwatch") -> None:
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class TrainingLoop:
    """One run, from a policy and a fleet that stand to the last step."""

    def __init__(
        self,
        config: RunConfig,
        *,
        trainer: Trainer,
        trainer_thread: ThreadPoolExecutor,
        runner: SampleRunner,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        folder: RunFolder,
        display: Display,
        progress: Progress,
        engine_dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.fleet = runner.fleet
        self.runner = runner
        self.problems = problems
        self.held_out = held_out
        self.folder = folder
        self.display = display
        self.progress = progress
        self.engine_dtype = engine_dtype
        self.watch = Stopwatch()  # of the whole run, by this process
        self.ledger = Ledger()
        self._thread = trainer_thread
        self._started_groups = 0
        self._first_version = 0  # the version at which the first group is started; `run` knows it
        self._max_staleness = config.rollout.max_staleness if config.mode == "standalone" else 0

    async def run(self) -> None:
        """Trains until `train.steps`. Evaluates before the first step, so that there is something to compare with."""
        self._first_version = self.progress.version
        if self.progress.step == 0:
            with self.watch("evaluation"):
                accuracy = await self.evaluate()
            self._record(StepMetrics(step=0, weight_version=self.progress.version, accuracy=accuracy))
        async with RolloutScheduler(self.runner, self.config.rollout.samples_per_group) as scheduler:
            self.ledger = scheduler.ledger
            while self.progress.step < self.config.train.steps:
                await self._step(scheduler)

    async def publish(self) -> None:
        """Brings the trainer's weights to the engines as the next version."""
        version = self.progress.version + 1
        self.display.phase(f"publishing version {version}")
        await self.fleet.publish(
            self.trainer.policy.named_tensors(self.engine_dtype),
            version,
            bucket_bytes=self.config.publish.bucket_bytes,
            deadline=self.config.publish.timeout,
            require_finite=self.config.publish.require_finite,
        )
        self.progress.version = version

    async def evaluate(self) -> float:
        """The share of held-out problems that greedy samples get right; a sample that failed is not right."""
        self.display.phase(f"evaluating on {len(self.held_out)} held-out problems")
        runner = replace(self.runner, sampling=greedy(self.runner.sampling), tool_counts=ToolCounts())
        async with RolloutScheduler(runner, samples_per_group=1) as scheduler:
            version = self.progress.version
            scheduler.start(((f"eval-{version}-{i}", problem) for i, problem in enumerate(self.held_out)), version)
            groups = [await scheduler.next_group() for _ in self.held_out]
        samples = [sample for group in groups for sample in group.samples]
        _require_some(samples, "the evaluation")
        return float(np.mean([sample.reward for sample in samples]))

    async def _step(self, scheduler: RolloutScheduler) -> None:
        config, watch = self.config, Stopwatch()
        with watch("step"):
            with watch("rollout"):
                groups, discarded = await self._take_groups(scheduler)
            samples = [sample for group in groups for sample in group.samples]
            lag = [self.progress.version - s.oldest_version for s in samples if s.oldest_version is not None]
            freed = 0.0
            if config.mode == "hybrid":
                awake = self._used_gib()
                with watch("sleep"):
                    await self.fleet.sleep()
                freed = awake - self._used_gib()
            with watch("train"):
                self.display.phase(f"training on {len(samples)} samples")
                stats = await self.in_trainer(self._train, groups)
            if config.mode == "hybrid":
                with watch("sleep"):
                    await self.fleet.wake(frozenset({MemoryTag.WEIGHTS}))
            with watch("publish"):
                await self.publish()
            if config.mode == "hybrid":
                with watch("sleep"):
                    await self.fleet.wake(frozenset({MemoryTag.KV_CACHE}))
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == config.train.steps
            scheduler.cancel_older_than(self.progress.version - self._max_staleness)
            if config.mode == "standalone" and not last:
                self._top_up(scheduler)
            accuracy = None
            if last or step % config.evaluation.every == 0:
                with watch("evaluation"):
                    accuracy = await self.evaluate()
            if last or step % config.checkpoint.every == 0:
                with watch("checkpoint"):
                    await self.save()
        self.folder.add_samples(step, samples + discarded, self.runner.chat)
        tools = self.runner.tool_counts
        self.watch.add(watch)
        standalone = config.mode == "standalone"
        self._record(
            _metrics(
                self.progress, stats, watch, samples, discarded, lag, accuracy, tools, freed, standalone=standalone
            )
        )
        tools.calls = tools.errors = 0

    async def save(self) -> None:
        self.display.phase("saving a checkpoint")
        consumed = (self.progress.version - self._first_version) * self.config.rollout.groups_per_step
        on_their_way = self._started_groups - consumed  # a run that resumes starts these problems again
        state = {"version": self.progress.version, "position": self.progress.position - on_their_way}
        await self.in_trainer(checkpoint.save, self.folder.path, self.trainer, state, keep=self.config.checkpoint.keep)

    async def _take_groups(self, scheduler: RolloutScheduler) -> tuple[list[Group], list[Sample]]:
        """The next groups to complete that are fresh enough, and the samples of those that were not or that failed."""
        wanted = self.config.rollout.groups_per_step
        groups: list[Group] = []
        discarded: list[Sample] = []
        while len(groups) < wanted:
            self._top_up(scheduler)
            self.display.phase(f"generating: {len(groups)} of {wanted} groups are complete")
            group = await scheduler.next_group()
            finished = tuple(s for s in group.samples if s.status is SampleStatus.FINISHED)
            if finished and staleness(group, self.progress.version) <= self._max_staleness:
                groups.append(replace(group, samples=finished))
                discarded += [s for s in group.samples if s.status is not SampleStatus.FINISHED]
            else:
                self._started_groups -= 1  # another problem may be started in its place
                discarded += group.samples
                _require_some(discarded, "this step", at_most=wanted * self.config.rollout.samples_per_group)
        return groups, discarded

    def _top_up(self, scheduler: RolloutScheduler) -> None:
        """Starts as many groups as the staleness bound allows."""
        allowed = admissible_groups(
            self.progress.version, self._first_version, self.config.rollout.groups_per_step, self._max_staleness
        )
        count = allowed - self._started_groups
        if count <= 0:
            return
        position = self.progress.position
        problems = problems_at(self.problems, self.config.seed, position, count)
        scheduler.start(((f"{position + i}", problem) for i, problem in enumerate(problems)), self.progress.version)
        self.progress.position += count
        self._started_groups += count

    def _train(self, groups: Sequence[Group]) -> StepStats:
        samples = []
        for group in groups:
            rewards = [sample.reward for sample in group.samples]
            advantages = group_advantages(rewards, normalize=self.config.train.loss.normalize_advantages)
            for sample, advantage in zip(group.samples, advantages, strict=True):
                assert sample.episode is not None
                episode = sample.episode
                ids = np.asarray(episode.token_ids, dtype=np.int64)
                samples.append(TrainSample(ids, episode.loss_mask, episode.logprobs, float(advantage)))
        return self.trainer.train_step(samples, self.config.rollout.temperature)

    def _used_gib(self) -> float:
        """What everybody together holds of the trainer's GPU."""
        if self.trainer.policy.world.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.trainer.policy.world.device)
        return (total - free) / 2**30

    async def in_trainer(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs in the trainer's own thread, so that the event loop goes on serving the rollouts."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    def _record(self, metrics: StepMetrics) -> None:
        self.folder.add_metrics(metrics)
        self.display.step(metrics)
        self.display.progress("steps", self.progress.step, self.config.train.steps)


def _require_some(samples: Sequence[Sample], where: str, at_most: int = 0) -> None:
    """Raises RolloutError when at least `at_most` samples have ended and every one of them failed."""
    failed = [sample for sample in samples if sample.status is SampleStatus.FAILED]
    if len(failed) == len(samples) >= max(1, at_most):
        reasons = sorted({sample.reason or "" for sample in failed})
        raise RolloutError(f"all {len(failed)} samples of {where} failed: {'; '.join(reasons[:3])}")


def _metrics(
    progress: Progress,
    stats: StepStats,
    watch: Stopwatch,
    samples: Sequence[Sample],
    discarded: Sequence[Sample],
    lag: Sequence[int],
    accuracy: float | None,
    tools: ToolCounts,
    freed_gib: float,
    *,
    standalone: bool,
) -> StepMetrics:
    def seconds(name: str) -> float:
        return round(watch.seconds.get(name, 0.0), 4)

    # In standalone mode the engines generate all the time; in hybrid mode, while the trainer waits.
    generating = max(watch.seconds["step" if standalone else "rollout"], 1e-9)
    tokens = sum(int(s.episode.loss_mask.sum()) for s in [*samples, *discarded] if s.episode is not None)
    return StepMetrics(
        step=progress.step,
        weight_version=progress.version,
        accuracy=accuracy,
        reward=float(np.mean([sample.reward for sample in samples])),
        staleness=float(np.mean(lag)) if lag else 0.0,
        rollout_seconds=seconds("rollout"),
        publish_seconds=seconds("publish"),
        train_seconds=seconds("train"),
        sleep_seconds=seconds("sleep"),
        freed_gib=round(freed_gib, 3),
        evaluation_seconds=seconds("evaluation"),
        checkpoint_seconds=seconds("checkpoint"),
        step_seconds=seconds("step"),
        tokens=tokens,
        tokens_per_second=tokens / generating,
        kl=stats.kl,
        clip_fraction=stats.clip_fraction,
        logprob_gap=stats.logprob_gap,
        entropy=stats.entropy,
        loss=stats.loss,
        grad_norm=stats.grad_norm,
        lr=stats.lr,
        samples_finished=len(samples),
        samples_failed=sum(s.status is SampleStatus.FAILED for s in discarded),
        samples_aborted=sum(s.status is not SampleStatus.FAILED for s in discarded),
        tool_calls=tools.calls,
        tool_errors=tools.errors,
    )
