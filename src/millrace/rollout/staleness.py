"""How far a sample may lag behind the trainer. Pure.

The trainer's version is the one it has published last; a sample's staleness is that version minus the oldest version
in the sample, at the moment when the sample is trained on.
"""

from millrace.rollout.sample import Group


def admissible_groups(version: int, first_version: int, groups_per_step: int, max_staleness: int) -> int:
    """How many groups may have been started in all since the trainer stood at `first_version`, now that it stands at
    `version`, so that none is trained on with more than `max_staleness` if they are consumed in order.

    The n-th group (from 1) is consumed by the step that starts at version `first_version + ceil(n / groups_per_step) -
    1`. The bound is that of AReaL (arXiv:2505.24298), counted in groups.
    """
    return (version - first_version + max_staleness + 1) * groups_per_step


def staleness(group: Group, version: int) -> int:
    """The largest staleness among the group's samples; 0 where none has tokens of a published version."""
    oldest = [s.oldest_version for s in group.samples if s.oldest_version is not None]
    return version - min(oldest, default=version)
