"""The one set of checks, held against one engine. A file for each engine, so that they run beside each other."""

import pytest

from millrace.conformance import CHECKS, Check, Outcome, Runner

START_TIMEOUT = 240.0  # seconds; a stock engine takes 20 on a quiet machine
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)


async def hold(runner: Runner, check: Check, lacking: frozenset[str]) -> None:
    """lacking: the checks that the engine can't be asked. Any other that is lacking is an error: a check that can't be
    made proves nothing."""
    result = await runner.examine(check)
    expected = Outcome.LACKING if check.name in lacking else Outcome.PASSED
    assert result.outcome is expected, result.reason
