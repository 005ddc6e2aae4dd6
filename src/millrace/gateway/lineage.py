"""What the headers of known agents say about the place of a request. They label branches and decide no tokens."""

from collections.abc import Mapping

import orjson

from millrace.gateway.call import Lineage

LONGEST = 200  # characters of a label that are kept


def lineage_of(headers: Mapping[str, str]) -> Lineage:
    """Return the labels in a request's headers, whose names are in lower case or case-insensitive.

    Claude Code sends `x-claude-code-agent-id` for sub-agents; opencode sends `x-parent-session-id`. A sub-agent of
    Codex has a `thread-id` of its own in the same `session-id`. Codex counts its compactions in
    `x-codex-window-id: ID:N`, and names the request for the summary in `x-codex-turn-metadata`.
    """
    session, thread = headers.get("x-session-id"), headers.get("thread-id")
    parent = headers.get("x-parent-session-id") or headers.get("x-claude-code-parent-agent-id")
    agent = headers.get("x-claude-code-agent-id") or (session if parent else None)
    if thread is not None and thread != (started := headers.get("session-id", thread)):
        agent, parent = thread, headers.get("x-codex-parent-thread-id", started)
    return Lineage(_short(agent), _short(parent), _short(_window(headers)))


def _window(headers: Mapping[str, str]) -> str | None:
    """Return the label of a context window of Codex; the request that makes its summary has one of its own."""
    window = headers.get("x-codex-window-id", "").rpartition(":")[2]
    try:
        metadata = orjson.loads(headers.get("x-codex-turn-metadata", "{}"))
    except orjson.JSONDecodeError:
        metadata = {}
    if isinstance(metadata, dict) and metadata.get("request_kind") == "compaction":
        return f"{window}:summary"
    return window or None


def _short(label: str | None) -> str | None:
    return None if label is None else label[:LONGEST]
