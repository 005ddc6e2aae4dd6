"""Which engine gets a request: a pure policy over a snapshot of the fleet."""

from collections.abc import Mapping

from millrace.fleet.membership import Snapshot


def least_loaded(snapshot: Snapshot, outstanding_tokens: Mapping[str, int]) -> str | None:
    """The routable engine with the fewest tokens outstanding (prompt and the most it may still generate), the first by
    name among equals; None when no engine is routable."""
    names = [member.name for member in snapshot.members if member.routable]
    return min(names, key=lambda name: (outstanding_tokens.get(name, 0), name), default=None)
