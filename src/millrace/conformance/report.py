"""The report of a run of the checks, as JSON and as Markdown tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from millrace.conformance.check import Check, Outcome, Result
from millrace.errors import DataError
from millrace.types import Capability, EngineInfo


@dataclass(frozen=True, slots=True)
class Report:
    """The results of the checks of one engine.

    lost: how the engine stopped serving, or None if it did not.
    """

    kind: str
    engine_version: str
    capabilities: frozenset[Capability]
    results: tuple[Result, ...]
    lost: str | None

    @property
    def title(self) -> str:
        """The engine's kind and version."""
        return f"{self.kind} {self.engine_version}"

    def count(self, outcome: Outcome) -> int:
        """Return the number of checks with this outcome."""
        return sum(result.outcome is outcome for result in self.results)

    @property
    def seconds(self) -> float:
        """Total duration of the checks."""
        return sum(result.seconds for result in self.results)


def report(info: EngineInfo, results: Sequence[Result], lost: str | None) -> Report:
    """Make the report of an engine from its info and results."""
    return Report(info.kind, info.engine_version, info.capabilities, tuple(results), lost)


def to_json(of: Report) -> bytes:
    """Return the report as JSON. `from_json` reads it."""
    return orjson.dumps({**asdict(of), "capabilities": sorted(of.capabilities)}, option=orjson.OPT_INDENT_2) + b"\n"


def from_json(path: Path) -> Report:
    """Read a report from a JSON file. Raises DataError if the file is not a report."""
    try:
        body: Mapping[str, Any] = orjson.loads(path.read_bytes())
        return Report(
            kind=body["kind"],
            engine_version=body["engine_version"],
            capabilities=frozenset(map(Capability, body["capabilities"])),
            results=tuple(
                Result(r["check"], Outcome(r["outcome"]), r["reason"], r["seconds"], r.get("skipped", False))
                for r in body["results"]
            ),
            lost=body["lost"],
        )
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a report of `millrace doctor --json`: {error!r}") from error


def capability_table(reports: Mapping[str, Report]) -> str:
    """Return a Markdown table of the capabilities, with one column for each report."""
    rows = [(f"`{c}`", ["yes" if c in one.capabilities else "" for one in reports.values()]) for c in Capability]
    return _table("capability", tuple(reports), rows)


def check_table(checks: Sequence[Check], reports: Mapping[str, Report]) -> str:
    """Return a Markdown table of the outcomes, with one column for each report, followed by the numbered reasons."""
    notes: list[str] = []

    def cell(one: Report, name: str) -> str:
        result = next((r for r in one.results if r.check == name), None)
        if result is None:
            return "not run"
        if not result.reason:
            return result.outcome
        if result.reason not in notes:
            notes.append(result.reason)
        return f"{result.outcome} ({notes.index(result.reason) + 1})"

    rows = [(f"`{c.name}`: {c.claim}", [cell(one, c.name) for one in reports.values()]) for c in checks]
    rows.append(("seconds in all", [f"{one.seconds:.0f}" for one in reports.values()]))
    lines = [_table("check", tuple(reports), rows)]
    if notes:
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


def _table(head: str, titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [_row(head, titles), _row("---", ["---"] * len(titles))]
    return "\n".join(lines + [_row(name, cells) for name, cells in rows])


def _row(first: str, others: Sequence[str]) -> str:
    return "| " + " | ".join([first, *others]) + " |"
