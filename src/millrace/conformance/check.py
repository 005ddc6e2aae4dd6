"""The check: a named test of one engine, which always gives a result."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from millrace.engines.base import Engine
from millrace.errors import EngineRefused
from millrace.types import Capability, EngineInfo


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine under test. No other client may control it or generate on it during the checks.

    folder: the model's folder, with the weights that the engine serves at the start.
    other: a folder with other weights of the same shapes.

    If the engine loads weights from disk, both must have the same paths on its host.
    """

    engine: Engine
    info: EngineInfo
    folder: Path | None = None
    other: Path | None = None


class CheckFailed(Exception):
    """The engine violates the contract. The message says what was observed."""


class Lacking(Exception):
    """The check can't be run here. The message names the missing requirement."""


class Outcome(StrEnum):
    """The outcome of a check. LACKING: a requirement of the check is missing."""

    PASSED = "passed"
    FAILED = "failed"
    LACKING = "lacking"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check.

    reason: why the check did not pass. It is empty if the check passed.
    seconds: the duration of the check.
    skipped: the check was not run, because the server had stopped serving.
    """

    check: str
    outcome: Outcome
    reason: str
    seconds: float
    skipped: bool = False


Examine = Callable[[Subject], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the contract.

    name: the check's id, such as `pause.keep`.
    claim: what the engine must do.
    needs: the capabilities without which the check is not run.
    examine: runs the check. It returns if the engine does what `claim` says. The engine is then as before: awake,
        running, with the folder's weights, and possibly with a higher version. Otherwise `examine` raises CheckFailed,
        an unexpected EngineError, or Lacking if it can't decide. The runner then restores the engine.
    """

    name: str
    claim: str
    needs: frozenset[Capability]
    examine: Examine


def check(name: str, claim: str, *needs: Capability) -> Callable[[Examine], Check]:
    """Return a decorator that makes a function a check."""
    return lambda examine: Check(name, claim, frozenset(needs), examine)


def expect(condition: bool, message: str) -> None:
    """Raise CheckFailed with `message` unless `condition` is true."""
    if not condition:
        raise CheckFailed(message)


@asynccontextmanager
async def refused(what: str) -> AsyncIterator[None]:
    """Expect that the call in the block is refused. Raises CheckFailed if it is not."""
    try:
        yield
    except EngineRefused:
        return
    raise CheckFailed(f"{what} was not refused")
