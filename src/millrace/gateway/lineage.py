"""What the headers of known agents say about the place of a request. They label branches and decide no tokens."""

from collections.abc import Mapping

from millrace.gateway.call import Lineage

LONGEST = 200  # characters of a label that are kept


def lineage_of(headers: Mapping[str, str]) -> Lineage:
    """Return the labels in a request's headers, whose names are in lower case or case-insensitive.

    Claude Code sends `x-claude-code-agent-id` for sub-agents; opencode sends `x-parent-session-id`; Codex counts its
    compactions in `x-codex-window-id: ID:N`.
    """
    session = headers.get("x-session-id")
    parent = headers.get("x-parent-session-id")
    agent = headers.get("x-claude-code-agent-id") or (session if parent else None)
    window = headers.get("x-codex-window-id", "").rpartition(":")[2]
    return Lineage(_short(agent), _short(parent), _short(window or None))


def _short(label: str | None) -> str | None:
    return None if label is None else label[:LONGEST]
