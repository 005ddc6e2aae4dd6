"""`millrace doctor` as a user runs it, and the tables that come of its reports."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
import pytest_asyncio

from millrace.conformance import CHECKS, Outcome, Result, select
from millrace.conformance.report import Report, capability_table, check_table, from_json, to_json
from millrace.errors import DataError
from millrace.types import Capability
from tests.conformance.conftest import ADMIN_KEY, API_KEY, embedded_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"MILLRACE_ENGINE_API_KEY": API_KEY, "MILLRACE_ENGINE_ADMIN_API_KEY": ADMIN_KEY}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with embedded_server(tiny_model, tmp_path_factory.mktemp("logs")) as url:
        yield url


async def doctor(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """Status, output and errors of the command, without the keys of this process's own environment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "millrace", "doctor", *arguments),
        env={"PATH": "", "HOME": "", "COLUMNS": "200", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_every_check_is_a_line(url: str) -> None:
    status, out, _ = await doctor(url, "--kind", "embedded", "--only", "*.info", **KEYS)
    assert status == 0
    assert "passed  identity.info" in out
    assert "1 passed, 0 failed, 0 lacking" in out


async def test_what_is_missing_is_said(url: str) -> None:
    status, out, _ = await doctor(url, "--kind", "embedded", "--only", "update.disk", **KEYS)
    assert status == 0
    assert "lacking update.disk" in out
    assert "no folder with other weights" in out


async def test_json_is_a_report(url: str, tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    folders = ("--model", str(tiny_model), "--other", str(other_model))
    status, out, err = await doctor(url, "--kind", "embedded", "--only", "update.disk", "--json", *folders, **KEYS)
    assert (status, err) == (0, "")
    path = tmp_path / "report.json"
    path.write_text(out)
    report = from_json(path)
    assert [(r.check, r.outcome) for r in report.results] == [("update.disk", Outcome.PASSED)]
    assert Capability.CHECKSUMS in report.capabilities
    assert "| `checksums` | yes |" in capability_table({report.title: report})
    assert "| passed |" in check_table(select("update.disk"), {report.title: report})
    assert orjson.loads(to_json(report)) == orjson.loads(out)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("{url}", "--kind", "embedded"), {}, "keys are read from MILLRACE_ENGINE_API_KEY"),
        (("{url}", "--kind", "embedded", "--only", "nothing"), KEYS, "no check is named like nothing"),
        (("http://127.0.0.1:1", "--kind", "sglang"), KEYS, "no sglang engine answers at http://127.0.0.1:1"),
    ],
    ids=["no keys", "no such check", "no server"],
)
async def test_what_can_not_begin_says_why(
    url: str, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    status, _, err = await doctor(*(argument.format(url=url) for argument in arguments), **environment)
    assert status == 1
    assert message in " ".join(err.split())


async def test_tables_number_their_reasons(tmp_path: Path) -> None:
    check = CHECKS[0]
    reports = [
        Report("a", "1", frozenset(), (Result(check.name, outcome, reason, 1.0),), None)
        for outcome, reason in ((Outcome.PASSED, ""), (Outcome.FAILED, "no"), (Outcome.LACKING, "no"))
    ]
    table = check_table([check], {one.title: one for one in reports})
    assert "| passed | failed (1) | lacking (1) |" in table
    assert table.endswith("\n1. no")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"broken.json is no report"):
        from_json(broken)
