"""The search for a text in a run's samples."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from millrace.errors import MonitorError
from millrace.viewer.index import Cursor, SampleIndex
from millrace.viewer.query import SHOWN, Where

MOST_FOUND = 500
FILE_DEADLINE = 30.0  # seconds for one file


@dataclass(frozen=True, slots=True)
class Found:
    """The progress of a search: files read, files in all, and the rows that one more file has."""

    read: int
    files: int
    rows: list[tuple[Any, ...]]
    problem: str | None = None
    full: bool = False  # there may be more, but the limit is reached


async def search(index: SampleIndex, condition: Where, text: str) -> AsyncGenerator[Found]:
    """Yield the samples that have the text, of files of the newest steps first.

    It may be in the conversation with its reasoning, tool calls and tools' answers, in the text of any token sequence,
    in the error, in the answer that is wanted, or in the problem's name. Case does not matter. Only samples that the
    condition is true of are looked at. It ends after MOST_FOUND samples.
    """
    files = await index.rows(
        f"SELECT file, max(step) AS newest FROM samples WHERE {condition.sql} GROUP BY file ORDER BY newest DESC, file",  # noqa: S608
        condition.values,
    )
    found = 0
    yield Found(0, len(files), [])
    for count, (number, _) in enumerate(files, start=1):
        path = index.path_of(number)
        rows: list[tuple[Any, ...]] = []
        problem = None
        if path is not None:
            try:
                rows = await index.ask(
                    partial(_in_file, path=path, number=number, condition=condition, text=text), FILE_DEADLINE
                )
            except MonitorError as error:
                problem = f"{path.name}: {error}"
        found += len(rows)
        full = found >= MOST_FOUND
        yield Found(count, len(files), rows[: len(rows) - max(0, found - MOST_FOUND)], problem, full)
        if full:
            return


def _in_file(cursor: Cursor, path: Path, number: int, condition: Where, text: str) -> list[tuple[Any, ...]]:
    """Return the rows of one file that have the text."""
    names = ", ".join(f's."{name}"' for name in SHOWN)
    written = " OR ".join(["contains(lower(messages), lower(?))"] * len(forms := _forms(text)))
    return cursor.execute(
        f"SELECT {names} FROM (SELECT * FROM samples WHERE file = ? AND {condition.sql}) AS s "  # noqa: S608
        f"JOIN (SELECT file_row_number AS row, {written} OR "
        "len(list_filter(sequences, lambda one: contains(lower(one.text), lower(?)))) > 0 AS found "
        "FROM read_parquet(?, file_row_number = true)) AS f ON s.row = f.row "
        "WHERE f.found OR contains(lower(concat_ws(chr(10), s.reason, s.answer, s.problem)), lower(?)) ORDER BY s.row",
        [number, *condition.values, *forms, text, str(path), text],
    ).fetchall()


def _forms(text: str) -> list[str]:
    """Return how a text may stand in the JSON of messages: as it is, and in the JSON of a tool call's arguments."""
    inner = (orjson.dumps(text).decode()[1:-1], json.dumps(text)[1:-1])  # with other letters than ASCII, and without
    return list(dict.fromkeys([inner[0], *(orjson.dumps(one).decode()[1:-1] for one in inner)]))
