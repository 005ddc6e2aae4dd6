"""One sample, from the Parquet file that holds it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from millrace.errors import MonitorError
from millrace.viewer.branches import branch_tree
from millrace.viewer.index import Cursor, Place

DIGITS = 5  # of logprobs, after the point
MOST_SEQUENCES = 256  # of one sample in the tree of its branches
SUMMARY = "list_transform(sequences, lambda s: {'end': s.end, 'turns': s.turns, 'length': len(s.token_ids)})"


def details(cursor: Cursor, place: Place) -> dict[str, Any]:
    """Return everything of a sample but its tokens: columns, conversation, and its sequences as a tree."""
    row = _row(cursor, place, f"* EXCLUDE (sequences), {SUMMARY} AS sequences")
    row["messages"] = conversation(row.get("messages"))
    if len(row.get("sequences") or ()) > 1:
        ids = _row(cursor, place, f"list_transform(sequences[1:{MOST_SEQUENCES}], lambda s: s.token_ids) AS ids")["ids"]
        row["tree"] = branch_tree(ids)
    return row


def tokens(cursor: Cursor, place: Place, number: int) -> dict[str, Any]:
    """Return the tokens of one sequence of a sample, each with its text, logprobs, mask and weight version."""
    sequence = _row(cursor, place, f"sequences[{number + 1}] AS sequence")["sequence"]
    if sequence is None:
        raise MonitorError(f"the sample has no sequence {number}")
    trained = sequence.get("trainer_logprobs")
    spans = sequence.get("version_spans") or []
    return {
        "sequence": number,
        "pieces": pieces(sequence["text"], sequence["ends"]),
        "ids": sequence["token_ids"],
        "mask": [int(one) for one in sequence["loss_mask"]],
        "logprobs": _rounded(sequence["logprobs"]),
        "trainer_logprobs": None if trained is None else _rounded(trained),
        "versions": [[span["version"], span["start"], span["end"]] for span in spans],
    }


def group(cursor: Cursor, places: Sequence[Place]) -> list[dict[str, Any]]:
    """Return samples side by side: their columns and conversations."""
    by_file: dict[Path, list[int]] = {}
    for place in places:
        by_file.setdefault(place.path, []).append(place.row)
    found = [row for path, rows in by_file.items() for row in _rows(cursor, path, rows, "* EXCLUDE (sequences)")]
    return [{**row, "messages": conversation(row.get("messages"))} for row in found]


def conversation(text: object) -> list[Any]:
    """Return the messages of a sample. A text that is not a list of messages becomes one message."""
    try:
        value = orjson.loads(text) if isinstance(text, str) else []
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    return [{"role": "unknown", "content": str(text)}]


def pieces(text: str, ends: Sequence[int]) -> list[str]:
    """Return the text of each token. `ends`: where each ends, in characters."""
    starts = [0, *ends]
    return [text[start:end] for start, end in zip(starts, ends, strict=False)]


def _rounded(values: Sequence[float | None]) -> list[float]:
    array: list[float] = np.round(np.asarray(values, dtype=np.float64), DIGITS).tolist()
    return array


def _row(cursor: Cursor, place: Place, chosen: str) -> dict[str, Any]:
    """Return what is chosen of a sample's row. Raises MonitorError if the file has changed and lacks the row."""
    if not (found := _rows(cursor, place.path, [place.row], chosen)):
        raise MonitorError(f"{place.path.name} has changed and has no row {place.row}")
    return found[0]


def _rows(cursor: Cursor, path: Path, rows: Sequence[int], chosen: str) -> list[dict[str, Any]]:
    """Return what is chosen of some rows of a file."""
    cursor.execute(
        f"SELECT {chosen} FROM read_parquet(?, file_row_number = true) "  # noqa: S608
        f"WHERE file_row_number IN ({', '.join('?' * len(rows))})",
        [str(path), *rows],
    )
    names = [column[0] for column in cursor.description or ()]
    found: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for row in found:
        row.pop("file_row_number", None)
    return found
