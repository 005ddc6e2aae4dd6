"""Every fault step on two embedded engines.

MILLRACE_FAULT_EXAMPLES also draws that many random sequences of steps.
"""

import asyncio

import pytest

from millrace.config import EmbeddedEngineConfig
from tests.weights.faults import (
    Bad,
    Corrupt,
    CorruptStore,
    Hang,
    Kill,
    Publish,
    Refuse,
    Restart,
    Step,
    SwitchTransport,
    at_random,
)
from tests.weights.machine import run
from tests.weights.variants import Tokens, Variant

ENGINES = 2
DEADLINE = 6.0  # in seconds, of a publish in which an engine hangs; a busy machine finishes the others in half of it

ALL: list[Step] = [
    Publish(),
    Bad("missing"),
    Corrupt(None),
    SwitchTransport("gloo"),
    Hang(1, resumes=True),
    Bad("cancelled"),
    Restart(1),
    Refuse(0),
    SwitchTransport("disk"),
    Bad("renamed"),
    Publish(),
    CorruptStore(0),
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
