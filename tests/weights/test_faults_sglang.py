"""Every fault step on two stock SGLang servers.

MILLRACE_FAULT_EXAMPLES also draws that many random sequences of steps, which take some minutes each.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.config.engines import EmbeddedEngineConfig, SGLangEngineConfig
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.faults import Bad, Corrupt, Hang, Kill, Publish, Restart, Step, SwitchTransport, at_random
from tests.weights.machine import run
from tests.weights.variants import Tokens, Variant, ask_servers

VERSION = "0.5.23"
ENGINES = 2
DEADLINE = 10.0  # in seconds, of a publish in which an engine hangs

ALL: list[Step] = [
    Publish(),
    Bad("older"),
    Bad("missing"),
    Publish(),
    Corrupt(0),
    SwitchTransport("gloo"),
    Hang(1, resumes=True),
    SwitchTransport("disk"),
    Bad("cancelled"),
    Publish(),
    Restart(1),
    Kill(0, midway=True),
]


@pytest.fixture(scope="session")
def config(sglang_python: Callable[[str], Path]) -> SGLangEngineConfig:
    return SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        replicas=ENGINES,
        python=sglang_python(VERSION),
        threads=1,
        start_timeout=START_TIMEOUT,
        version=VERSION,
    )


@pytest.mark.slow
def test_everything_happens_once(
    config: SGLangEngineConfig, variants: list[Variant], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference tokens come from embedded engines, which start sooner. The check before the first step shows that
    this engine makes the same tokens from the same folder."""
    place = tmp_path_factory.mktemp("fleet")
    quick = EmbeddedEngineConfig(kind="embedded", threads=1)
    asyncio.run(run(ALL, config, variants, asyncio.run(ask_servers(quick, variants, place)), place, deadline=DEADLINE))


def test_a_single_server_is_compared_with_what_was_sent(
    config: SGLangEngineConfig, variants: list[Variant], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its weight loader reports what arrived, so that it needs no other server to be compared with."""
    place = tmp_path_factory.mktemp("fleet")
    alone = config.model_copy(update={"replicas": 1})
    quick = EmbeddedEngineConfig(kind="embedded", threads=1)
    steps: list[Step] = [Publish(), Corrupt(None), Publish(), Bad("older"), Publish()]
    steps += [SwitchTransport("gloo"), Publish(), Corrupt(None), Publish(), Bad("missing"), Publish()]
    asyncio.run(run(steps, alone, variants, asyncio.run(ask_servers(quick, variants, place)), place, deadline=DEADLINE))


@at_random(ENGINES, least=12, most=24)
def test_anything_happens(
    config: SGLangEngineConfig,
    variants: list[Variant],
    references: list[Tokens],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[Step],
) -> None:
    asyncio.run(run(steps, config, variants, references, tmp_path_factory.mktemp("fleet"), deadline=DEADLINE))
