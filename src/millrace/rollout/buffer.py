"""The groups that a trainer takes, step by step: the first that are complete, fresh enough and worth training on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from millrace.errors import RolloutError
from millrace.rollout.data import problems_at
from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.staleness import admissible_groups, staleness


@dataclass(frozen=True, slots=True)
class StalenessPolicy:
    """How fast groups are started and taken. `max_staleness`, in versions, bounds what is trained on; `ahead`: versions
    for which groups are started before the trainer gets there. `extra`: groups that are started beyond those that a
    step takes. `most_dropped`: groups without a signal, all rewards alike, that a step may pass over for others
    (dynamic sampling, DAPO, arXiv:2503.14476)."""

    groups_per_step: int
    samples_per_group: int
    max_staleness: int = 0
    ahead: int = 0
    extra: int = 0
    most_dropped: int = 0


@dataclass(slots=True)
class RolloutBatch:
    """One step's share. `groups` have finished samples only; `discarded` are the samples that failed, were given up or
    were too old; `dropped` had no signal."""

    groups: list[Group] = field(default_factory=list)
    discarded: list[Sample] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    @property
    def all_samples(self) -> list[Sample]:
        return [*self.samples, *self.discarded, *(sample for group in self.dropped for sample in group.samples)]


class RolloutBuffer:
    """Starts groups of `problems`, in the order that `seed` gives, from `position` on, as far as the pace allows for a
    trainer that stands at `version` now. Their names begin with `prefix`."""

    def __init__(
        self,
        scheduler: RolloutScheduler,
        problems: Sequence[Problem],
        policy: StalenessPolicy,
        *,
        seed: int,
        position: int,
        version: int,
        prefix: str = "",
    ) -> None:
        self._scheduler, self._problems, self._policy = scheduler, problems, policy
        self._seed, self._prefix = seed, prefix
        self._position = position
        self._first_version = version
        self._started = 0  # groups, without those that others were started for

    @property
    def position(self) -> int:
        """Where a run that resumes goes on in the order of the problems: those that are on their way start again."""
        return self._position - self._scheduler.in_flight

    async def take(self, version: int, tell: Callable[[int], None]) -> RolloutBatch:
        """What the step that begins at `version` trains on, as soon as it is complete; `tell` is told how many groups
        are. Raises RolloutError when as many samples as a step takes have ended and all of them failed."""
        policy, taken = self._policy, RolloutBatch()
        while len(taken.groups) < policy.groups_per_step:
            self.top_up(version)
            tell(len(taken.groups))
            group = await self._scheduler.next_group()
            finished = tuple(s for s in group.samples if s.status is SampleStatus.FINISHED)
            if not finished or staleness(group, version) > policy.max_staleness:
                taken.discarded += group.samples
                require_some(taken.discarded, "this step", at_most=policy.groups_per_step * policy.samples_per_group)
            elif len(taken.dropped) < policy.most_dropped and not has_signal(finished):
                taken.dropped.append(group)
            else:
                taken.groups.append(replace(group, samples=finished))
                taken.discarded += [s for s in group.samples if s.status is not SampleStatus.FINISHED]
                continue
            self._started -= 1  # another problem may be started in its place
        return taken

    def top_up(self, version: int) -> None:
        """Starts as many groups as the pace allows."""
        policy = self._policy
        allowed = admissible_groups(version, self._first_version, policy.groups_per_step, policy.ahead) + policy.extra
        count = allowed - self._started
        if count <= 0:
            return
        problems = problems_at(self._problems, self._seed, self._position, count)
        named = ((f"{self._prefix}{self._position + i}", one) for i, one in enumerate(problems))
        self._scheduler.start(named, version)
        self._position += count
        self._started += count

    def give_up_old(self, version: int) -> None:
        """Ends what can't be trained on any more by a trainer that stands at `version`."""
        self._scheduler.cancel_older_than(version - self._policy.max_staleness)


def has_signal(samples: Sequence[Sample]) -> bool:
    """Whether the rewards differ: otherwise every advantage of the group is 0."""
    return any(sample.reward != samples[0].reward for sample in samples)


def require_some(samples: Sequence[Sample], where: str, at_most: int = 0) -> None:
    """Raises RolloutError when at least `at_most` samples have ended and every one of them failed."""
    failed = [sample for sample in samples if sample.status is SampleStatus.FAILED]
    if len(failed) == len(samples) >= max(1, at_most):
        reasons = sorted({sample.reason or "" for sample in failed})
        raise RolloutError(f"all {len(failed)} samples of {where} failed: {'; '.join(reasons[:3])}")
