"""Real servers that compute prompts and generate apart serve as one replica of a fleet."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config.engines import PrefillDecodeConfig
from millrace.engines.stock.interpreter import StockConfig
from millrace.engines.stock.pair import PrefillDecodeEngine
from millrace.errors import EngineRefused
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.types import Generation, Health, PauseMode
from tests.fleet.prefill_decode import (
    DEADLINE,
    ENDLESS,
    PROMPTS,
    START_TIMEOUT,
    TOKENS,
    Bounds,
    Made,
    asking,
    busy,
    check_generates_as_a_lone_server,
    check_pause_and_abort,
    check_publish,
    check_recovery,
    config_on_cpu,
    engine_of,
    generated,
    generated_alone,
    make_models,
    require_same,
    tensors,
)
from tests.fleet.test_sharing import following

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
EXACT = Bounds()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StockConfig:
    return config_on_cpu(request, tmp_path_factory.mktemp("nixl"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(
    config: StockConfig, models: Sequence[Path], tmp_path_factory: pytest.TempPathFactory
) -> Sequence[Made]:
    return await generated_alone(config, models, tmp_path_factory.mktemp("alone"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    config: StockConfig,
    models: Sequence[Path],
    alone: Sequence[Made],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Fleet]:
    decode = 2 if config.kind == "sglang" else 1
    pair = config.model_copy(update={"prefill_decode": PrefillDecodeConfig(decode=decode)})
    folder = tmp_path_factory.mktemp("versions")
    logs = tmp_path_factory.mktemp("logs")
    async with open_fleet(pair, models[0], log_dir=logs, folder=folder, restarts=2) as fleet:
        yield fleet


async def transferred(fleet: Fleet) -> float:
    """How often vLLM's decode server has fetched the KV cache of a prompt."""
    lines = str(await engine_of(fleet).servers[0]._ask("/metrics")).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:nixl_xfer_time_seconds_count"))


async def test_it_generates_what_a_lone_server_does(fleet: Fleet, alone: Sequence[Made]) -> None:
    await check_generates_as_a_lone_server(fleet, alone, EXACT)


async def test_prompts_are_computed_on_the_prefill_server(config: StockConfig, fleet: Fleet) -> None:
    if config.kind != "vllm":
        pytest.skip("SGLang's decode servers can't do without")
    before = await transferred(fleet)
    await generated(fleet)
    assert await transferred(fleet) >= before + len(PROMPTS)  # more if a lease expired, on a busy machine


async def test_followers_generate_what_the_owner_does(config: StockConfig, fleet: Fleet, alone: Sequence[Made]) -> None:
    async with fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:
        require_same(await generated(follower), alone[0], 0, EXACT)
        *some, part = [part async for part in follower.stream(asking(PROMPTS[1]), deadline=DEADLINE)]
        assert some
        require_same([part], alone[0][1:2], 0, EXACT)
        whole = replace(asking(PROMPTS[0]), prompt_logprobs=True)
        made = [await one.generate(whole, deadline=DEADLINE) for one in (follower, fleet)]
        assert made[0].prompt_logprobs is not None
        assert made[1].prompt_logprobs is not None
        assert abs(made[0].prompt_logprobs[1:] - made[1].prompt_logprobs[1:]).max() < EXACT.logprobs
        [engine] = follower.engines.values()
        assert isinstance(engine, PrefillDecodeEngine) == (config.kind == "sglang")  # which has two decode servers
        async with following(shared.url, shared.key) as process:
            await process.read()
            there = await process.tell("elsewhere")
        here = await fleet.generate(asking((5, 17, 300, 42, 8)), deadline=DEADLINE)
        assert (there["ids"], there["spans"]) == (list(here.output_ids), [[0, None, TOKENS]])


async def test_updates_pauses_and_aborts_reach_the_requests_of_followers(
    fleet: Fleet, models: Sequence[Path], alone: Sequence[Made]
) -> None:
    engine, long = engine_of(fleet), EXACT.long
    async with fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:

        async def until_aborted(stop: Callable[[], Awaitable[object]]) -> Sequence[Generation]:
            """Return what requests of the follower have made when `stop` ends them."""
            tasks = [
                asyncio.create_task(follower.generate(asking(prompt, ENDLESS), deadline=DEADLINE)) for prompt in PROMPTS
            ]
            await busy(engine, len(tasks))
            await stop()
            return [await task for task in tasks]

        async def paused() -> None:
            await engine.pause(PauseMode.ABORT)
            assert await engine.health() is Health.PAUSED
            await engine.resume()

        for stop in (engine.abort, paused):
            assert {made.finish_reason for made in await until_aborted(stop)} == {"abort"}
        for which in (1, 0):
            version = (fleet.version or 0) + 1
            async with asyncio.TaskGroup() as group:
                running = [
                    group.create_task(follower.generate(asking(prompt, long), deadline=DEADLINE, retries=9))
                    for prompt in PROMPTS
                ]
                await busy(engine)
                report = await fleet.publish(tensors(models[which]), version)
            assert not report.failed
            for task in running:
                assert len(task.result().output_ids) == long
                assert {span.version for span in task.result().version_spans} <= {version - 1, version}
            require_same(await generated(follower), alone[which], version, EXACT)
        await engine.flush_cache()  # so no half of a request is left on any server
        # An abort is no fault of the engine.
        assert not [event for event in follower.event_log.newest if event.kind == "request"]


async def test_a_request_for_more_top_logprobs_than_sglang_can_exchange_is_refused(
    config: StockConfig, fleet: Fleet
) -> None:
    if config.kind != "sglang":
        pytest.skip("it is for SGLang")
    for number, refused in ((128, False), (129, True)):
        request = replace(asking(PROMPTS[0]), extra={"top_logprobs_num": number})
        with pytest.raises(EngineRefused, match="at most 128") if refused else nullcontext():
            await fleet.generate(request, deadline=DEADLINE)


async def test_a_publish_reaches_both_sides(fleet: Fleet, models: Sequence[Path], alone: Sequence[Made]) -> None:
    await check_publish(fleet, models, alone, EXACT)


async def test_pauses_and_aborts_reach_both_sides(fleet: Fleet) -> None:
    await check_pause_and_abort(fleet, EXACT)


async def test_sleep_reaches_both_sides(fleet: Fleet, models: Sequence[Path], alone: Sequence[Made]) -> None:
    engine, version = engine_of(fleet), fleet.version
    assert version is not None
    await fleet.sleep()
    assert await engine.health() is Health.ASLEEP
    await fleet.wake()
    await fleet.publish(tensors(models[0]), version + 1)
    require_same(await generated(fleet), alone[0], version + 1, EXACT)


async def test_it_comes_back_as_a_whole_when_a_prefill_server_dies(fleet: Fleet, alone: Sequence[Made]) -> None:
    assert fleet.version is not None
    async with fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:
        before = follower.engines
        long = asyncio.create_task(follower.generate(asking(PROMPTS[0], 1000), deadline=START_TIMEOUT, retries=3))
        await busy(engine_of(fleet))
        await check_recovery(fleet, alone[0], EXACT)
        assert len((await long).output_ids) == 1000
        await follower.reached(fleet.version, deadline=DEADLINE)
        assert follower.engines.keys() == before.keys()
        require_same(await generated(follower), alone[0], fleet.version, EXACT)
