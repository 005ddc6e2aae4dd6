"""Which engine gets a request, and what its answer is of: pure policies over a snapshot of the fleet."""

from collections.abc import Mapping
from dataclasses import replace

from millrace.fleet.membership import Snapshot
from millrace.types import Generation


def least_loaded(snapshot: Snapshot, outstanding_tokens: Mapping[str, int]) -> str | None:
    """The routable engine with the fewest tokens outstanding (prompt and the most it may still generate), the first by
    name among equals; None when no engine is routable."""
    names = [member.name for member in snapshot.members if member.routable]
    return min(names, key=lambda name: (outstanding_tokens.get(name, 0), name), default=None)


def with_adapter(made: Generation, version: int | None) -> Generation:
    """What came of a request that was sent with the adapter of `version`, whose engine names the weights below it. They
    are older than the adapter; newer ones came whole in the meantime, and took it off."""

    def maker(said: int | None) -> int | None:
        return version if said is None or version is None or said < version else said

    return replace(made, segments=tuple(replace(one, version=maker(one.version)) for one in made.segments))
