"""Two embedded engines, to which everything happens once.

With MILLRACE_FAULT_EXAMPLES, also, to which anything happens in any order, in so many sequences.
"""

import asyncio

import pytest

from millrace.config import EmbeddedEngineConfig
from tests.weights.faults import (
    Bad,
    Corrupt,
    Hang,
    Kill,
    Publish,
    Refuse,
    Restart,
    Spoil,
    Step,
    Travel,
    at_random,
)
from tests.weights.machine import run
from tests.weights.variants import Tokens, Variant

ENGINES = 2
DEADLINE = 6.0  # seconds of a publish in which an engine hangs; the others must be done in half of it on a busy machine

ALL: list[Step] = [
    Publish(),
    Bad("missing"),
    Corrupt(None),
    Travel("gloo"),
    Hang(1, resumes=True),
    Bad("cancelled"),
    Restart(1),
    Refuse(0),
    Travel("disk"),
    Bad("renamed"),
    Publish(),
    Spoil(0),
    Publish(),
    Corrupt(1),
    Kill(0, midway=True),
]


@pytest.fixture(scope="module")
def config() -> EmbeddedEngineConfig:
    return EmbeddedEngineConfig(kind="embedded", replicas=ENGINES, threads=1, faults=True)


@pytest.mark.slow
def test_everything_happens_once(
    config: EmbeddedEngineConfig,
    variants: list[Variant],
    references: list[Tokens],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    asyncio.run(run(ALL, config, variants, references, tmp_path_factory.mktemp("fleet"), deadline=DEADLINE))


@at_random(ENGINES, least=6, most=12)
def test_anything_happens(
    config: EmbeddedEngineConfig,
    variants: list[Variant],
    references: list[Tokens],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[Step],
) -> None:
    asyncio.run(run(steps, config, variants, references, tmp_path_factory.mktemp("fleet"), deadline=DEADLINE))
