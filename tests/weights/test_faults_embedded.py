"""Embedded engines, to which anything happens in any order.

MILLRACE_FAULT_EXAMPLES says how many sequences are drawn besides, at random.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings

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
    sequences,
)
from tests.weights.machine import run
from tests.weights.variants import Tokens, Variant, ask_servers, make_variants

EXAMPLES = int(os.environ.get("MILLRACE_FAULT_EXAMPLES", "0"))
ENGINES = 2
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=ENGINES, threads=1, faults=True)
DEADLINE = 3.0  # seconds of a publish in which an engine hangs

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


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    return make_variants(tmp_path_factory.mktemp("variants"), 3)


@pytest.fixture(scope="session")
def references(variants: list[Variant], tmp_path_factory: pytest.TempPathFactory) -> list[Tokens]:
    return asyncio.run(ask_servers(CONFIG, variants, tmp_path_factory.mktemp("references")))


@settings(
    max_examples=EXAMPLES or 1, phases=[Phase.explicit, Phase.reuse, Phase.generate] if EXAMPLES else [Phase.explicit]
)
@example(ALL)
@given(sequences(ENGINES, least=6, most=12))
def test_every_routable_engine_serves_the_published_version(
    tmp_path_factory: pytest.TempPathFactory,
    variants: Sequence[Variant],
    references: Sequence[Tokens],
    steps: list[Step],
) -> None:
    place: Path = tmp_path_factory.mktemp("fleet")
    asyncio.run(run(steps, CONFIG, variants, references, place, deadline=DEADLINE))
