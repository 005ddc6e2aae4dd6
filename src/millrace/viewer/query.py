"""Questions about samples: filters, order and pages, from the parameters of a request. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace.errors import ArgumentError

# The columns of the in-memory table that come from the files, with their types in DuckDB.
COLUMNS = {
    "step": "INTEGER", "sample": "VARCHAR", "group": "VARCHAR", "problem": "VARCHAR", "answer": "VARCHAR",
    "status": "VARCHAR", "reason": "VARCHAR", "end": "VARCHAR", "reward": "DOUBLE", "advantage": "DOUBLE",
    "turns": "INTEGER", "tool_calls": "INTEGER", "tool_errors": "INTEGER", "prompt_tokens": "INTEGER",
    "tokens": "INTEGER", "oldest_version": "INTEGER", "newest_version": "INTEGER", "gap": "DOUBLE",
    "started_at": "DOUBLE", "seconds": "DOUBLE",
}  # fmt: skip
SHOWN = tuple(name for name in COLUMNS if name not in ("answer", "reason"))
EXACT = ("status", "end")
WITHIN = ("group", "problem", "sample")
RANGES = {
    "step": ("step", "step"), "reward": ("reward", "reward"), "advantage": ("advantage", "advantage"),
    "tokens": ("tokens", "tokens"), "turns": ("turns", "turns"), "gap": ("gap", "gap"),
    "version": ("newest_version", "oldest_version"),  # a range contains a sample if any of its versions is in it
}  # fmt: skip
MOST_ROWS = 500
DEFAULT_ROWS = 100
LONGEST_TEXT = 500  # characters of what is looked for


@dataclass(frozen=True, slots=True)
class Where:
    """A condition in SQL and its values."""

    sql: str
    values: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Which rows of the matching samples to return, and in which order."""

    order: str
    offset: int
    limit: int


def where(parameters: Mapping[str, str]) -> Where:
    """Return the condition that the parameters state. Raises ArgumentError if one is not valid.

    `status` and `end` are equal to the value. `group`, `problem` and `sample` contain it. Of a range, such as `step`,
    `step_min` and `step_max` are the inclusive bounds. Empty values state nothing.
    """
    parts: list[str] = []
    values: list[object] = []
    for name in EXACT:
        if text := parameters.get(name):
            parts.append(f'"{name}" = ?')
            values.append(text)
    for name in WITHIN:
        if text := parameters.get(name):
            parts.append(f'contains(lower("{name}"), lower(?))')
            values.append(text[:LONGEST_TEXT])
    for name, (least, most) in RANGES.items():
        for column, bound, sign in ((least, "min", ">="), (most, "max", "<=")):
            if text := parameters.get(f"{name}_{bound}"):
                parts.append(f'"{column}" {sign} ?')
                values.append(number(f"{name}_{bound}", text))
    return Where(" AND ".join(parts) or "true", tuple(values))


def page(parameters: Mapping[str, str]) -> Page:
    """Return the page that the parameters ask for: `sort` (with `-` before it, the largest first), `offset`, `limit`.

    Raises ArgumentError if one is not valid.
    """
    sort = parameters.get("sort") or "-step"
    column, down = sort.removeprefix("-"), sort.startswith("-")
    if column not in SHOWN:
        raise ArgumentError(f"sort: there is no column {column[:40]!r}; the columns are {', '.join(SHOWN)}")
    ties = "step DESC, rowid" if column != "step" else "rowid"  # that is the order in the files
    order = f'"{column}" {"DESC" if down else "ASC"} NULLS LAST, {ties}'
    offset = whole("offset", parameters.get("offset") or "0", 2**40)
    limit = whole("limit", parameters.get("limit") or str(DEFAULT_ROWS), MOST_ROWS)
    return Page(order, offset, limit)


def number(name: str, text: str) -> float:
    """Return a parameter as a number. Raises ArgumentError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise ArgumentError(f"{name}: {text[:40]!r} is not a number")
    return value


def whole(name: str, text: str, most: int) -> int:
    """Return a parameter as an integer from 0 to `most`. Raises ArgumentError."""
    if not text.isdecimal() or not text.isascii() or len(text) > 15 or int(text) > most:
        raise ArgumentError(f"{name}: {text[:40]!r} is not a whole number from 0 to {most}")
    return int(text)
