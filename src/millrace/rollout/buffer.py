"""The source of each training step's groups: the first that are complete, fresh enough and have a learning signal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from millrace.errors import RolloutError
from millrace.rollout.data import problems_at
from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.staleness import admissible_groups, leaves_room, staleness


@dataclass(frozen=True, slots=True)
class StalenessPolicy:
    """How early groups are started and how old they may be when they are trained on.

    groups_per_step: groups of one training step. samples_per_group: samples of one group. max_staleness: the limit on
    the age of a group, in weight versions. ahead: for how many versions ahead of the trainer groups are started.
    extra: groups started beyond those that a step takes. most_dropped: how many groups without a signal (their rewards
    are all equal) a step may replace by others (dynamic sampling, DAPO, arXiv:2503.14476).
    """

    groups_per_step: int
    samples_per_group: int
    max_staleness: int = 0
    ahead: int = 0
    extra: int = 0
    most_dropped: int = 0


@dataclass(slots=True)
class RolloutBatch:
    """The groups of one training step.

    groups: with finished samples only. discarded: samples that failed, were aborted or were too old. dropped: groups
    without a signal.
    """

    groups: list[Group] = field(default_factory=list)
    discarded: list[Sample] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """The samples to train on."""
        return [sample for group in self.groups for sample in group.samples]

    @property
    def all_samples(self) -> list[Sample]:
        """The samples to train on, the discarded ones and those of dropped groups."""
        return [*self.samples, *self.discarded, *(sample for group in self.dropped for sample in group.samples)]


class RolloutBuffer:
    """Starts groups on a scheduler and collects those of each training step.

    problems: repeated without end, in an order that depends on `seed`. position: where in this order to start. version:
    the weight version that the trainer has published last. prefix: of the group ids. steps: how many steps will take
    groups; none are started that only later steps would take.

    >>> async with RolloutScheduler(runner, policy.samples_per_group) as scheduler:
    ...     buffer = RolloutBuffer(scheduler, problems, policy, seed=0, position=0, version=1)
    ...     batch = await buffer.take(1, on_progress=print)
    """

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
        steps: int | None = None,
    ) -> None:
        self._scheduler, self._problems, self._policy = scheduler, problems, policy
        self._seed, self._prefix = seed, prefix
        self._position = position
        self._first_version = version
        self._steps = steps
        self._started = 0  # groups, without those that were replaced by others
        self._begun: dict[str, int] = {}  # the trainer's version at the start of each group that was not taken yet
        self._held: list[Group] = []  # complete groups that wait for older ones

    @property
    def position(self) -> int:
        """The position from which a resumed run continues. It starts the groups in flight again."""
        return self._position - self.in_flight

    @property
    def in_flight(self) -> int:
        """The number of groups that were started and not taken yet."""
        return self._scheduler.in_flight + len(self._held)

    async def take(self, version: int, on_progress: Callable[[int], None]) -> RolloutBatch:
        """Wait for the groups of the step that starts at `version`, and return them.

        They are the first complete ones, as long as the others can still be taken before they are too old.

        on_progress: called with the number of complete groups whenever it may have changed. Raises RolloutError if as
        many samples as a step takes have ended and all of them failed, and whatever `next_group` raises.
        """
        policy, batch = self._policy, RolloutBatch()
        while len(batch.groups) < policy.groups_per_step:
            self.top_up(version)
            on_progress(len(batch.groups))
            slots = policy.groups_per_step - len(batch.groups)
            group = self._next_held(version, slots) or await self._scheduler.next_group()
            if not self._may_take(group, version, slots):
                self._held.append(group)
                continue
            del self._begun[group.group_id]
            finished = tuple(s for s in group.samples if s.status is SampleStatus.FINISHED)
            if not finished or staleness(group, version) > policy.max_staleness:
                batch.discarded += group.samples
                require_some(batch.discarded, "this step", at_most=policy.groups_per_step * policy.samples_per_group)
            elif len(batch.dropped) < policy.most_dropped and not has_signal(finished):
                batch.dropped.append(group)
            else:
                batch.groups.append(replace(group, samples=finished))
                batch.discarded += [s for s in group.samples if s.status is not SampleStatus.FINISHED]
                continue
            self._started -= 1  # another group may be started instead
        return batch

    def top_up(self, version: int) -> None:
        """Start as many groups as the staleness policy allows for a trainer at `version`."""
        policy = self._policy
        allowed = admissible_groups(version, self._first_version, policy.groups_per_step, policy.ahead)
        if self._steps is not None:
            allowed = min(allowed, self._steps * policy.groups_per_step)
        count = allowed + policy.extra - self._started
        if count <= 0:
            return
        problems = problems_at(self._problems, self._seed, self._position, count)
        named = {f"{self._prefix}{self._position + i}": problem for i, problem in enumerate(problems)}
        self._scheduler.start(named.items(), version)
        self._begun.update(dict.fromkeys(named, version))
        self._position += count
        self._started += count

    def give_up_old(self, version: int) -> None:
        """Cancel the groups that are too old for a trainer at `version`."""
        self._scheduler.cancel_older_than(version - self._policy.max_staleness)

    def _next_held(self, version: int, slots: int) -> Group | None:
        """Return the oldest held group, which is held no longer; None if it may not be taken, and so none may."""
        oldest = min(self._held, key=lambda group: self._begun[group.group_id], default=None)
        if oldest is None or not self._may_take(oldest, version, slots):
            return None
        self._held.remove(oldest)
        return oldest

    def _may_take(self, group: Group, version: int, slots: int) -> bool:
        """Return whether a step that starts at `version`, and still takes `slots` groups, may take this one."""
        policy = self._policy
        if not policy.ahead:  # the rest of a step is given up on purpose
            return True
        last = {name: begun + policy.max_staleness for name, begun in self._begun.items()}
        own = last.pop(group.group_id)
        return leaves_room(
            own, last.values(), version, slots=slots, groups_per_step=policy.groups_per_step, spare=policy.extra
        )


def has_signal(samples: Sequence[Sample]) -> bool:
    """Return whether the rewards differ. If they don't, every advantage of the group is 0."""
    return any(sample.reward != samples[0].reward for sample in samples)


def require_some(samples: Sequence[Sample], where: str, at_most: int = 0) -> None:
    """Raise RolloutError if at least `at_most` samples have ended and all of them failed."""
    failed = [sample for sample in samples if sample.status is SampleStatus.FAILED]
    if len(failed) == len(samples) >= max(1, at_most):
        reasons = sorted({sample.reason or "" for sample in failed})
        raise RolloutError(f"all {len(failed)} samples of {where} failed: {'; '.join(reasons[:3])}")
