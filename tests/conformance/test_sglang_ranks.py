"""Stock SGLang with data-parallel attention on two ranks, over which the experts of a mixture are spread. Weights come
by the weight loader."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.base import Engine
from millrace.engines.sglang.adapter import SGLangEngine, encode
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Capability, FinishReason, GenerateRequest, SamplingParams
from tests.collectives import install_collectives
from tests.conformance.ranks import (
    DEADLINE,
    RANKS,
    check_ranks_hold_their_experts,
    check_weights_come,
    make_spread_folders,
)
from tests.conformance.run_checks import START_TIMEOUT

ROUNDS, MANY = 8, 400

# Slow: an idle rank computes along with the others, and each call waits for that.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_spread_folders(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    sglang_python: Callable[[str], Path], folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    plugin = install_collectives(tmp_path_factory.mktemp("collectives"))
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        python=sglang_python("0.5.23"),
        tp_size=RANKS,
        dp_size=RANKS,
        ep_size=RANKS,
        threads=1,
        start_timeout=2 * START_TIMEOUT,
        engine_args={"enable_dp_attention": True},
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **plugin},
    )
    fleet: Fleet
    async with open_fleet(config, folders[0], log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        [engine] = fleet.engines.values()
        yield engine


async def test_every_rank_has_its_experts(engine: Engine) -> None:
    await check_ranks_hold_their_experts(engine, split=frozenset({"lm_head.weight"}))


async def test_weights_come_by_the_weight_loader(engine: Engine, folders: tuple[Path, Path]) -> None:
    assert Capability.SAMPLED_CHECKSUMS in (await engine.info()).capabilities
    await check_weights_come(engine, "shm", folders)


async def test_an_abort_ends_no_request_that_comes_after_it(engine: Engine) -> None:
    """The schedulers are in a step when both arrive, because they have a request that this adapter knows nothing of."""
    assert isinstance(engine, SGLangEngine)
    for number in range(ROUNDS):
        busy = GenerateRequest((5, 6, 7), SamplingParams(MANY, ignore_eos=True), request_id=f"busy-{number}")
        running = asyncio.create_task(engine._http.generate("/generate", encode(busy), deadline=DEADLINE))
        while not (await engine.loads()).running_requests:
            assert not running.done()
        await engine.abort()
        request = GenerateRequest((5, 6, 7), SamplingParams(4, ignore_eos=True), request_id=f"after-{number}")
        made = await engine.generate(request, deadline=DEADLINE)
        assert (made.finish_reason, len(made.output_ids)) == (FinishReason.LENGTH, 4)
        await running
