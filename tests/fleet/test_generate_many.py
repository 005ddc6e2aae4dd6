"""Many requests and streams on real engines: each sample is answered once, and none is left on an engine."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from millrace.errors import ArgumentError, EngineRefused, EngineUnreachable, NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.fleet.routing import Why
from millrace.types import FinishReason, GenerateRequest, RoutingContext, SamplingParams
from tests.fleet.test_fleet import CONFIG, PROMPT, embedded, greedy, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
END = 60.0
IMPOSSIBLE = GenerateRequest((10**6,), SamplingParams(4))  # a token that the model does not have


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


async def test_every_sample_completes_once_and_a_failure_is_its_own(fleet: Fleet) -> None:
    requests = [greedy("a"), IMPOSSIBLE, greedy("b")]
    completions = [one async for one in fleet.generate_many(iter(requests), n=3, deadline=END)]
    assert sorted((one.index, one.sample) for one in completions) == [(i, s) for i in range(3) for s in range(3)]
    alone = await fleet.generate(greedy("alone"), deadline=END)
    for one in completions:
        assert (one.generation is None) == (one.index == 1) == isinstance(one.error, EngineRefused)
        if one.generation is not None:
            assert one.request.request_id == one.generation.request_id == f"{'ab'[one.index // 2]}-{one.sample}"
            assert one.result().output_ids == alone.output_ids
    with pytest.raises(EngineRefused):
        next(one for one in completions if one.error is not None).result()
    assert set(fleet.outstanding.values()) == {0}


async def test_samples_of_one_request_share_a_group_and_differ(fleet: Fleet) -> None:
    before = fleet.event_log.metrics.routed[Why.GROUP]
    request = GenerateRequest(PROMPT, SamplingParams(12, seed=7, ignore_eos=True))
    made = await fleet.generate_all([request], n=4, deadline=END)
    assert len({one.output_ids for one in made}) == 4
    assert fleet.event_log.metrics.routed[Why.GROUP] > before
    assert (await fleet.generate(request, deadline=END)).output_ids == made[0].output_ids
    assert [one.output_ids for one in await fleet.generate_all([request], n=4, deadline=END)] == [
        one.output_ids for one in made
    ]


async def test_all_come_in_the_order_of_the_requests_or_the_first_error_ends_them(fleet: Fleet) -> None:
    requests = [greedy(f"r{tokens}", tokens) for tokens in (30, 2, 17)]
    made = await fleet.generate_all((one for one in requests), deadline=END, n=2)
    assert [len(one.output_ids) for one in made] == [30, 30, 2, 2, 17, 17]
    assert await fleet.generate_all([], deadline=END) == []
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.05)
    with pytest.raises(EngineRefused):
        await fleet.generate_all([greedy("endless", 200), IMPOSSIBLE], deadline=END)
    await idle(fleet)
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.0)
    mixed = await fleet.generate_all([IMPOSSIBLE, greedy("fine")], deadline=END, return_exceptions=True)
    assert isinstance(mixed[0], EngineRefused)
    assert not isinstance(mixed[1], Exception)


async def test_requests_are_read_as_fast_as_completions_are_taken(fleet: Fleet) -> None:
    read = 0

    def endless() -> Iterator[GenerateRequest]:
        nonlocal read
        while True:
            read += 1
            yield greedy(f"endless-{read}", 1)

    running = [replica.info.max_running for replica in fleet.replicas.by_name.values()]
    most = 2 * sum(one or 0 for one in running)
    assert most > 0
    async with aclosing(fleet.generate_many(endless(), deadline=END)) as completions:
        for taken in range(1, 200):
            assert (await anext(completions)).error is None
            assert read <= taken + most
    await idle(fleet)
    assert set(fleet.outstanding.values()) == {0}


async def test_each_request_is_routed_by_itself(fleet: Fleet) -> None:
    def routing(request: GenerateRequest) -> RoutingContext:
        return RoutingContext(min_version=9 if request.request_id == "future" else None)

    requests = [greedy("now"), greedy("future")]
    now, future = await fleet.generate_all(requests, deadline=0.5, routing=routing, return_exceptions=True)
    assert not isinstance(now, Exception)
    assert isinstance(future, NoEngineError)
    with pytest.raises(NoEngineError):
        await fleet.generate_all([greedy("all")], deadline=0.5, routing=RoutingContext(exact_version=9))


async def test_what_is_not_meant(fleet: Fleet) -> None:
    given: Any
    for given, says in (
        ({"n": 0}, "n must be 1 or more, and is 0"),
        ({"n": 1.5}, "n must be an integer"),
        ({"retries": -1}, "retries must be 0 or more"),
        ({"deadline": None}, "deadline must be a number"),
        ({"routing": "session"}, "routing must be a RoutingContext or a function"),
    ):
        with pytest.raises(ArgumentError, match=says):
            fleet.generate_many([greedy("r")], **{"deadline": END, **given})
    wrong: Any = [greedy("r"), "hello"]
    with pytest.raises(ArgumentError, match="request must be a GenerateRequest, and is 'hello'"):
        await fleet.generate_all(wrong, deadline=END)
    unrouted: Any = lambda _: None  # noqa: E731
    with pytest.raises(ArgumentError, match="routing must be a RoutingContext, and is None"):
        await fleet.generate_all([greedy("r")], deadline=END, routing=unrouted)
    await idle(fleet)


async def test_a_stream_grows_to_what_generate_returns(fleet: Fleet) -> None:
    whole = await fleet.generate(greedy("whole"), deadline=END)
    items = [one async for one in fleet.stream(greedy("streamed"), deadline=END)]
    for one, two in pairwise(items):
        assert two.output_ids[: len(one.output_ids)] == one.output_ids
        assert one.finish_reason is FinishReason.ABORT
    last = items[-1]
    assert (last.output_ids, last.finish_reason) == (whole.output_ids, FinishReason.LENGTH)
    np.testing.assert_array_equal(last.logprobs, whole.logprobs)
    assert last.version_spans == whole.version_spans
    assert set(fleet.outstanding.values()) == {0}
    with pytest.raises(NoEngineError):
        await anext(fleet.stream(greedy("r"), deadline=0.1, routing=RoutingContext(min_version=9)))
    with pytest.raises(EngineRefused):
        await anext(fleet.stream(IMPOSSIBLE, deadline=END))


async def test_closing_a_stream_aborts_its_request(fleet: Fleet) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.05)
    async with aclosing(fleet.stream(greedy("closed", 200), deadline=END)) as stream:
        await anext(stream)
        assert sum(fleet.outstanding.values()) == len(PROMPT) + 200
    assert set(fleet.outstanding.values()) == {0}
    await idle(fleet)
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.0)


async def test_a_follower_has_all_of_it(fleet: Fleet) -> None:
    async with fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:
        completions = [one async for one in follower.generate_many([greedy("f"), IMPOSSIBLE], n=2, deadline=END)]
        assert sorted(one.error is None for one in completions) == [False, False, True, True]
        items = [one async for one in follower.stream(greedy("g"), deadline=END)]
        assert len(items[-1].output_ids) == 12


async def test_samples_survive_an_engine_that_dies(tiny_model: Path, tmp_path: Path) -> None:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.05)
        stream = fleet.stream(greedy("streamed", 200), deadline=END)
        await anext(stream)
        [home] = [name for name, tokens in fleet.outstanding.items() if tokens]
        [victim] = [engine for engine in embedded(fleet) if engine.name == home]
        requests = [greedy(f"r{number}", 60) for number in range(8)]
        running = asyncio.create_task(fleet.generate_all(requests, deadline=END, retries=2))
        async with asyncio.timeout(END):
            while (await victim.loads()).running_requests < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(EngineUnreachable):
            await victim.inject_fault("crash")
        with pytest.raises(EngineUnreachable):
            async for _ in stream:
                pass
        assert fleet.snapshot.get(home).phase is Phase.DEAD
        made = await running
        assert len({one.output_ids for one in made}) == 1
        assert {len(one.output_ids) for one in made} == {60}
