"""Parts of messages that extensions of engines write."""

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """The first five names in alphabetical order, and the number of the others."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters."""
    return str(error).partition("\n")[0][:300]
