"""What a check is: a question to one engine, with a name, and an answer that is never left out."""

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
    """The engine that is examined. No other controls it, and nobody else generates on it meanwhile.

    folder: the model's, with the weights that it serves at the start; other: one with other weights of the same shapes.
    Both must lie under the same path for the engine's host, where it loads from disk.
    """

    engine: Engine
    info: EngineInfo
    folder: Path | None = None
    other: Path | None = None


class CheckFailed(Exception):
    """The engine does not do what the contract says. The message says what was seen."""


class Lacking(Exception):
    """The check can't be made here. The message names what is missing."""


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    LACKING = "lacking"


@dataclass(frozen=True, slots=True)
class Result:
    """How one check came out; `reason` is empty where it passed. `skipped`: it was not made, since the server was lost
    before it."""

    check: str
    outcome: Outcome
    reason: str
    seconds: float
    skipped: bool = False


Examine = Callable[[Subject], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """`examine` returns where the engine does what `claim` says, and leaves it as it was: awake, running, with the
    folder's weights, whose version may have grown. Otherwise it raises CheckFailed, or an EngineError that it did not
    expect, or Lacking where it can't tell; then the runner brings the engine back."""

    name: str
    claim: str
    needs: frozenset[Capability]
    examine: Examine


def check(name: str, claim: str, *needs: Capability) -> Callable[[Examine], Check]:
    """Makes a function a check."""
    return lambda examine: Check(name, claim, frozenset(needs), examine)


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


@asynccontextmanager
async def refused(what: str) -> AsyncIterator[None]:
    """Around a call that the engine has to refuse."""
    try:
        yield
    except EngineRefused:
        return
    raise CheckFailed(f"{what} was not refused")
