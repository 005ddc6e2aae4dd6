"""Episodes on disk: one file for each, so that agents go on after a restart of the gateway.

A file has one JSON object a line: the episode, its generations, which of them the agent got, and its end. Keys of
episodes are kept as digests only.
"""

import base64
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from millrace.errors import ConfigError, DataError
from millrace.gateway.call import Lineage, ToolUse, TurnText
from millrace.gateway.tree import BranchReason, Node, Tree
from millrace.jsonl import drop_torn_tail
from millrace.types import ExpertArray, FinishReason, VersionSpan

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"


class Journal:
    """Writes one episode's file, which is open only meanwhile: there may be more episodes than file descriptors.

    path: None if nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def opened(self, episode_id: str, key_digest: str, metadata: Mapping[str, object], created: float) -> None:
        """Write the episode's first line."""
        self._write({"episode": episode_id, "key": key_digest, "metadata": metadata, "created": created})

    def added(self, node: Node) -> None:
        """Write a generation."""
        if self.path is not None:
            self._write({"node": node.number, **encoded(node)})

    def delivered(self, numbers: Sequence[int]) -> None:
        """Write that the agent got these generations."""
        if numbers:
            self._write({"delivered": list(numbers)})

    def closed(self, reward: float | None, parts: Mapping[str, float]) -> None:
        """Write the end of the episode."""
        self._write({"closed": True, "reward": reward, "parts": dict(parts)})

    def delete(self) -> None:
        """Remove the file. Nothing is written any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def _write(self, line: Mapping[str, object]) -> None:
        """Raises ConfigError."""
        if self.path is None:
            return
        try:
            with open(self.path, "ab", opener=_private) as file:
                file.write(orjson.dumps(line) + b"\n")
        except OSError as error:
            raise ConfigError(f"gateway.folder: {self.path} can't be written: {error.strerror}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_journals(folder: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield the lines of every episode in a folder. A file without a first line is left out, with a warning.

    Raises DataError if a line is damaged, and OSError.
    """
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        drop_torn_tail(path)
        try:
            lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}: a line is damaged: {error}") from error
        if not lines or "episode" not in lines[0]:
            log.warning("%s is no episode, and is left out", path)
            continue
        yield path, lines


def encoded(node: Node) -> dict[str, object]:
    """Return a generation as JSON values. Its tools are left out if they are its parent's."""
    same = node.parent is not None and node.parent.tools is node.tools
    return {
        "parent": None if node.parent is None else node.parent.number,
        "tools": None if same else node.tools,
        "added": [_plain(message) for message in node.added],
        "context_ids": node.context_ids,
        "output_ids": node.output_ids,
        "logprobs": base64.b64encode(node.logprobs.tobytes()).decode(),
        "version_spans": [[span.version, span.start, span.end] for span in node.version_spans],
        "finish": node.finish,
        "reasoning": node.turn.reasoning,
        "content": node.turn.content,
        "calls": [[call.id, call.name, call.arguments] for call in node.turn.calls],
        "malformed": node.turn.malformed,
        "identity": node.identity.hex(),
        "request": node.request,
        "reason": node.reason,
        "lineage": [node.lineage.agent, node.lineage.parent, node.lineage.compaction],
        "temperature": node.temperature,
        "images": [base64.b64encode(image).decode() for image in node.images],
        "routed_experts": None if node.routed_experts is None else _encoded_experts(node.routed_experts),
    }


def decoded(tree: Tree, line: Mapping[str, Any]) -> Node:
    """Return a generation of a line. Its parent is in the tree. Raises what a line that lacks a field makes."""
    images = [base64.b64decode(image) for image in line["images"]]
    parent = None if line["parent"] is None else tree.nodes[line["parent"]]
    return Node(
        number=line["node"],
        parent=parent,
        tools=parent.tools if parent and line["tools"] is None else tuple(line["tools"]),
        added=_restored(line["added"], images),
        context_ids=tuple(line["context_ids"]),
        output_ids=tuple(line["output_ids"]),
        logprobs=np.frombuffer(base64.b64decode(line["logprobs"]), np.float32),
        version_spans=tuple(VersionSpan(*span) for span in line["version_spans"]),
        finish=FinishReason(line["finish"]),
        turn=TurnText(
            line["reasoning"],
            line["content"],
            tuple(ToolUse(*call) for call in line["calls"]),
            line["malformed"],
        ),
        identity=bytes.fromhex(line["identity"]),
        request=line["request"],
        reason=None if line["reason"] is None else BranchReason(line["reason"]),
        lineage=Lineage(*line["lineage"]),
        temperature=line["temperature"],
        images=tuple(images),
        routed_experts=_decoded_experts(line.get("routed_experts")),  # journals of earlier versions have none
    )


def _encoded_experts(experts: ExpertArray) -> list[object]:
    return [experts.dtype.name, experts.shape, base64.b64encode(experts.tobytes()).decode()]


def _decoded_experts(stored: Any) -> ExpertArray | None:
    if stored is None:
        return None
    name, shape, data = stored
    experts: ExpertArray = np.frombuffer(base64.b64decode(data), np.dtype(name)).reshape(shape)
    return experts


def _plain(message: Mapping[str, object]) -> dict[str, object]:
    """Return a message without the contents of its images, which stand beside it."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in content]}


def _restored(messages: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> tuple[Mapping[str, object], ...]:
    left = iter(images)
    restored = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [{**part, "image": next(left)} if part["type"] == "image" else part for part in content]
            message = {**message, "content": parts}
        restored.append(message)
    return tuple(restored)
