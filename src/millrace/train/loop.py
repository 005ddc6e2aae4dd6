"""The training loop: take complete groups, train on them, publish the weights, repeat.

Both modes use this loop. In `hybrid` mode the engines sleep while the trainer trains. In `standalone` mode they keep
generating, as far ahead as `max_staleness` allows.
"""

import logging
import math
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch

from millrace.config.models import RunConfig
from millrace.errors import ConfigError, MillraceError, WeightsChanged
from millrace.rollout.buffer import RolloutBatch, RolloutBuffer, StalenessPolicy, require_some
from millrace.rollout.judge import Judge, JudgeCounts, grade_in_turn
from millrace.rollout.runner import SampleRunner, ToolCounts, greedy
from millrace.rollout.sample import Group, Problem, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler, SampleCounts
from millrace.rollout.timings import Stopwatch
from millrace.serve.view import Observer
from millrace.train import checkpoint
from millrace.train.advice import Bounds, work_of
from millrace.train.batch import sequences_of
from millrace.train.display import Display
from millrace.train.metrics import Progress, StepMetrics, step_metrics
from millrace.train.ranks import Ranks
from millrace.train.record import RunFolder
from millrace.train.samples import Trained, trained_samples
from millrace.train.stopping import Stop
from millrace.train.trackers.base import RunState
from millrace.train.trackers.figures import training_view
from millrace.train.trackers.recorder import Trackers
from millrace.train.trainer import StepStats, Trainer
from millrace.train.writer import Writer
from millrace.types import MemoryTag
from millrace.weights.sharded import ShardedTensors

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class TrainingLoop:
    """The steps of a run, for a trainer and a fleet that are ready."""

    def __init__(
        self,
        config: RunConfig,
        *,
        trainer: Trainer,
        ranks: Ranks,
        runner: SampleRunner,
        judge: Judge | None,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        folder: RunFolder,
        display: Display,
        trackers: Trackers,
        observer: Observer,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.ranks = ranks
        self.runner = runner
        self.judge = judge
        self.problems = problems
        self.held_out = held_out
        self.folder = folder
        self.display = display
        self.trackers = trackers
        self.observer = observer
        self.progress = progress
        self.stop = stop
        self.watch = Stopwatch()  # of the whole run, by this process
        self.counts = SampleCounts()
        self._policy = staleness_policy(config, ranks.world.size)
        self._training = False
        self._saved: int | None = None  # the step of the last checkpoint
        bounds = Bounds(config.rollout.samples_per_group, self._policy.max_staleness)
        self._writer = Writer(folder, runner.chat, bounds, title=config.name, leads=ranks.owned is not None)

    async def run(self) -> None:
        """Evaluate if no step has been done, and run the steps up to `train.steps`.

        If a rank is asked to stop, all ranks save a checkpoint of the last complete step, and return. Raises
        MillraceError, such as RolloutError if all samples of a step failed.
        """
        self.stop.saves = True
        async with self._writer:
            await self._run()

    async def _run(self) -> None:
        if self.progress.step == 0:
            with self.watch("evaluation"):
                accuracy = await self.evaluate()
            metrics = StepMetrics(step=0, weight_version=self.progress.version, accuracy=accuracy)
            self._record(metrics, RolloutBatch())
        async with RolloutScheduler(self.runner, self.config.rollout.samples_per_group) as scheduler:
            self.counts = scheduler.counts
            buffer = RolloutBuffer(
                scheduler,
                self.problems,
                self._policy,
                seed=self.config.seed,
                position=self.progress.position,
                version=self.progress.version,
                prefix=self.ranks.prefix,
                steps=self.config.train.steps - self.progress.step,
            )
            position = buffer.position
            while self.progress.step < self.config.train.steps and not await self._stopping():
                if await self._step(buffer):
                    position = buffer.position
            if self.progress.step < self.config.train.steps and self._saved != self.progress.step:
                await self.save(position)
            if self.progress.step < self.config.train.steps:
                self.trackers.state = RunState.INTERRUPTED

    async def _stopping(self) -> bool:
        """Return whether a rank was asked to stop. All ranks call it together, and get the same answer."""
        number = await self.ranks.largest(self.stop.signal or 0)
        if number:
            self.stop.ask(signal.Signals(number))
        return bool(number)

    async def update_engines(self) -> None:
        """Publish the trainer's weights to the engines as the next version. Raises PublishError."""
        version = self.progress.version + 1
        self.display.phase(f"publishing version {version}")
        await self.ranks.publish_together(self._weights, version, self.config.publish)
        self.progress.version = version

    def _weights(self) -> ShardedTensors:
        """Return the tensors to publish. The fleet calls it again when an engine has lost its weights.

        Raises WeightsChanged during a training step.
        """
        if self._training:
            raise WeightsChanged("the trainer is in the middle of a step")
        return self.trainer.policy.named_tensors()

    async def wake_cache(self) -> None:
        """Wake the KV caches, and wait until requests use the version that was published last."""
        await self.ranks.wake(frozenset({MemoryTag.KV_CACHE}))
        await self.ranks.reached(self.progress.version, deadline=self.config.publish.timeout)

    async def evaluate(self) -> float | None:
        """Return the mean reward of greedy samples on the held-out problems; None if the run is asked to stop.

        It is the reward of the functions alone, even if there is a judge. With the rule this is the accuracy, from 0 to
        1. Failed samples count as 0. Raises RolloutError if all samples failed.
        """
        self.display.phase(f"evaluating on {len(self.held_out)} held-out problems")
        sampling = greedy(self.runner.sampling)
        runner = replace(self.runner, sampling=sampling, tool_counts=ToolCounts(), judge=None)
        async with RolloutScheduler(runner, samples_per_group=1) as scheduler:
            version = self.progress.version
            names = f"{self.ranks.prefix}eval-{version}"
            scheduler.start(((f"{names}-{i}", problem) for i, problem in enumerate(self.held_out)), version)
            groups = await self.stop.unless_asked(_next(scheduler, len(self.held_out)))
            if await self._stopping() or groups is None:
                return None
        samples = [sample for group in groups for sample in group.samples]
        require_some(samples, "the evaluation")
        correct, count = await self.ranks.sums(sum(sample.reward for sample in samples), len(samples))
        return correct / count

    async def _step(self, buffer: RolloutBuffer) -> bool:
        """Run one step. Return False if the run is asked to stop before it has the step's samples."""
        config, watch = self.config, Stopwatch()
        with watch("step"):
            with watch("rollout"):
                batch = await self.stop.unless_asked(buffer.take(self.progress.version, self._show_generating))
            if await self._stopping() or batch is None:
                return False
            lag = [self.progress.version - s.oldest_version for s in batch.samples if s.oldest_version is not None]
            buffer.give_up_old(self.progress.version + 1)  # the version at which the next step begins
            awake = self._used_gib()
            if not await self._with_engines(self._sleep(watch)):
                return False
            freed = awake - self._used_gib() if config.mode == "hybrid" else 0.0
            if self.judge is not None and self.judge.config.mode == "colocated":
                with watch("judge"):
                    await self._grade(self.judge, batch)
            with watch("train"):
                self.display.phase(f"training on {len(batch.samples)} samples")
                self._training = True
                stats, trained = await self.in_trainer(self._train, batch.groups)
                self._training = False
            version = self.progress.version + 1
            stopping = await self._stopping() or not await self._with_engines(self._publish(watch))
            if stopping:
                self.progress.version = version  # it is published when the run is resumed
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == config.train.steps
            if config.mode == "standalone" and not (last or stopping):
                buffer.top_up(self.progress.version)
            accuracy = None
            if not stopping and (last or step % config.evaluation.every == 0):
                with watch("evaluation"):
                    accuracy = await self.evaluate()
        await self._writer.add_samples(step, batch.all_samples, trained)
        self.trackers.samples(step, batch.samples, self.runner.chat)
        tools, grades = self.runner.tool_counts, self.judge.counts if self.judge is not None else JudgeCounts()
        self.watch.add(watch)
        standalone = config.mode == "standalone"
        metrics = step_metrics(
            self.progress, stats, watch, batch, lag, accuracy, tools, grades, freed, standalone=standalone
        )
        metrics = await self.ranks.over_all(metrics)
        self._record(metrics, batch)
        _warn_of_unread(grades)
        tools.calls = tools.errors = 0
        grades.clear()
        # The checkpoint comes after the record: a resumed run can drop later records, but can't replace missing ones.
        if last or step % config.checkpoint.every == 0:
            with self.watch("checkpoint"):
                await self.save(buffer.position)
        return True

    async def _sleep(self, watch: Stopwatch) -> None:
        """Put the engines of a hybrid run to sleep."""
        if self.config.mode == "hybrid":
            with watch("sleep"):
                await self.ranks.sleep(interrupt=self.config.rollout.recycle)

    async def _publish(self, watch: Stopwatch) -> None:
        """Publish the step's weights, to engines that a hybrid run wakes."""
        hybrid = self.config.mode == "hybrid"
        if hybrid:
            with watch("sleep"):
                await self.ranks.wake(frozenset({MemoryTag.WEIGHTS}))
        with watch("publish"):
            await self.update_engines()
        if hybrid:
            with watch("sleep"):
                await self.wake_cache()

    async def _with_engines(self, work: Coroutine[None, None, None]) -> bool:
        """Do a part of a step, and return whether it succeeded.

        It may only fail if the single rank is asked to stop: then the signal may have ended the engines, too.
        """
        try:
            await work
        except MillraceError as error:
            if self.stop.signal is None or self.ranks.world.size > 1:
                raise
            logger.warning("the run ends, and its engines are gone: %s", error)
            return False
        return True

    async def _grade(self, judge: Judge, batch: RolloutBatch) -> None:
        """Have a colocated judge grade the samples while the engines sleep. Samples without a grade become FAILED."""
        self.display.phase(f"grading {len(batch.samples)} samples")
        chat, deadline = self.runner.chat, self.config.rollout.sample_timeout
        batch.groups, failed = await grade_in_turn(judge, batch.groups, chat, deadline=deadline)
        batch.discarded += failed
        self.counts.ended[SampleStatus.FINISHED] -= len(failed)
        self.counts.ended[SampleStatus.FAILED] += len(failed)
        require_some([*batch.samples, *failed], "this step")

    async def save(self, position: int) -> None:
        """Save a checkpoint. `position`: the rollout buffer's, on this rank. Raises CheckpointError."""
        self.display.phase("saving a checkpoint")
        await self._writer.done()
        [over_all] = await self.ranks.sums(position)
        state = {"version": self.progress.version, "position": int(over_all)}
        await self.in_trainer(checkpoint.save, self.folder.path, self.trainer, state, keep=self.config.checkpoint.keep)
        self._saved = self.progress.step

    def _train(self, groups: Sequence[Group]) -> tuple[StepStats, dict[str, Trained]]:
        normalize = self.config.train.loss.normalize_advantages
        samples = [one for group in groups for one in sequences_of(group, normalize=normalize)]
        stats = self.trainer.train_step(samples, self.config.rollout.temperature)
        return stats, trained_samples(groups, samples, stats.logprobs)

    def _show_generating(self, complete: int) -> None:
        self.display.phase(f"generating: {complete} of {self._policy.groups_per_step} groups are complete")

    def _used_gib(self) -> float:
        """Return the used memory of the trainer's GPU, by all processes, in GiB; 0 on the CPU."""
        if self.trainer.policy.world.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.trainer.policy.world.device)
        return (total - free) / 2**30

    async def in_trainer(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in the trainer's thread, so that the event loop can serve the rollouts meanwhile."""
        return await self.ranks.thread.run(function, *args, **kwargs)

    def _record(self, metrics: StepMetrics, batch: RolloutBatch) -> None:
        fleet = self.runner.fleet
        failed = [(s.sample_id, s.reason or "") for s in batch.discarded if s.status is SampleStatus.FAILED]
        self._writer.add_step(metrics, work_of(fleet.event_log.metrics, fleet.engines), next(iter(failed), None))
        self.trackers.figures(metrics)
        self.observer.training = training_view(metrics, self.observer.training)
        self.display.step(metrics)
        self.display.progress("steps", self.progress.step, self.config.train.steps)


async def _next(scheduler: RolloutScheduler, count: int) -> list[Group]:
    return [await scheduler.next_group() for _ in range(count)]


def _warn_of_unread(grades: JudgeCounts) -> None:
    """Log that no reply of the judge had a grade, so that the rewards of the step mean nothing."""
    if grades.unread and grades.unread == grades.graded:
        logger.warning(
            "no grade was found in any of the judge's %d answers, and all count as 0; check judges.verdict and "
            "judges.max_new_tokens",
            grades.graded,
        )


def staleness_policy(config: RunConfig, ranks: int) -> StalenessPolicy:
    """Return the staleness policy of one rank. Raises ConfigError if the ranks can't share the groups evenly."""
    rollout = config.rollout
    if rollout.groups_per_step % ranks:
        raise ConfigError(f"{ranks} ranks can't share rollout.groups_per_step {rollout.groups_per_step} evenly")
    ahead = rollout.max_staleness if config.mode == "standalone" else 0
    return StalenessPolicy(
        groups_per_step=rollout.groups_per_step // ranks,
        samples_per_group=rollout.samples_per_group,
        max_staleness=rollout.max_staleness if config.mode == "standalone" or rollout.recycle else 0,
        ahead=ahead,
        extra=math.ceil(rollout.over_sampling / ranks),
        most_dropped=math.ceil(rollout.dynamic_sampling / ranks),
    )
