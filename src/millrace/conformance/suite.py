"""All checks, in the order in which they run. Checks come after those that they depend on."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from millrace.conformance.check import Check
from millrace.conformance.checks import (
    aborting,
    caching,
    crowding,
    experts,
    generating,
    identity,
    images,
    lora,
    pausing,
    refusing,
    sampling,
    sleeping,
    streaming,
    updating,
    versions,
)
from millrace.errors import ConfigError

CHECKS: Sequence[Check] = (
    *identity.CHECKS,
    *generating.CHECKS,
    *sampling.CHECKS,
    *streaming.CHECKS,
    *refusing.CHECKS,
    *aborting.CHECKS,
    *pausing.CHECKS,
    *caching.CHECKS,
    *sleeping.CHECKS,
    *updating.CHECKS,
    *versions.CHECKS,
    *lora.CHECKS,
    *images.CHECKS,
    *experts.CHECKS,
    *crowding.CHECKS,
)


def select(pattern: str) -> list[Check]:
    """Return the checks whose names match a pattern, such as `pause.*`. Raises ConfigError if no name matches."""
    if chosen := [check for check in CHECKS if fnmatchcase(check.name, pattern)]:
        return chosen
    groups = sorted({check.name.partition(".")[0] for check in CHECKS})
    raise ConfigError(f"no check matches {pattern}; the groups are {', '.join(f'{group}.*' for group in groups)}")
