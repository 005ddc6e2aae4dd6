"""Limits on how far samples lag behind the trainer. Pure functions.

A sample's staleness is the trainer's version (the one that it has published last) minus the oldest version in the
sample, at the moment when the sample is trained on.
"""

from collections.abc import Iterable

from millrace.rollout.sample import Group


def admissible_groups(version: int, first_version: int, groups_per_step: int, max_staleness: int) -> int:
    """Return how many groups may have been started since `first_version` when the trainer is at `version`.

    With this bound no group exceeds `max_staleness` if groups are consumed in order: the n-th group (from 1) is
    consumed by the step that starts at version `first_version + ceil(n / groups_per_step) - 1`. It is the bound of
    AReaL (arXiv:2505.24298), counted in groups.
    """
    return (version - first_version + max_staleness + 1) * groups_per_step


def leaves_room(
    last: int, others: Iterable[int], version: int, *, slots: int, groups_per_step: int, spare: int = 0
) -> bool:
    """Return whether the step that starts at `version` may take a group, so that every other can be taken in time.

    Slow groups would otherwise be overtaken until they are too old, and their tokens lost. The rule is that of earliest
    deadline first: for each step before the group's own last one, the others that must be taken by then have room.

    last: the last version at whose step the group may be taken. others: the same of all groups that were started and
    not taken. slots: how many groups this step still takes. spare: how many groups may be given up.
    """
    due = sorted(others)
    for count, other in enumerate(due, 1):
        if other >= last:
            return True
        if count > slots - 1 + max(other - version, 0) * groups_per_step + spare:
            return False
    return True


def staleness(group: Group, version: int) -> int:
    """Return the largest staleness of the group's samples, in versions; 0 if none has tokens of a published version."""
    oldest = [s.oldest_version for s in group.samples if s.oldest_version is not None]
    return version - min(oldest, default=version)
