"""Processes that follow a fleet. Each sends its own requests, and the owner alone decides the state of the engines."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.errors import EngineUnreachable, NoEngineError
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.types import FinishReason, MemoryTag, RoutingContext, VersionSpan
from tests.fleet.test_fleet import CONFIG, busy, embedded, expected, greedy, tensors

KEY = "the fleet's key"


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):  # an engine restarts meanwhile, on a busy machine too
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_follower_knows_what_its_owner_knows(tiny_model: Path, tmp_path: Path, model: PreTrainedModel) -> None:
    async with (
        open_fleet(CONFIG, tiny_model, log_dir=tmp_path, folder=tmp_path / "versions", restarts=2) as fleet,
        fleet.share(key=KEY) as shared,
        follow_fleet(shared.url, KEY, seed=1) as follower,
    ):
        assert follower.snapshot.replicas == fleet.snapshot.replicas
        assert follower.context_length == fleet.context_length
        made = await follower.generate(greedy("mine"), deadline=20)
        assert (made.output_ids, made.version_spans) == (expected(model), (VersionSpan(0, 0, 12),))
        assert fleet.outstanding == {"embedded-0": 0, "embedded-1": 0}

        # The request asks for a version before its snapshot has arrived.
        waiting = asyncio.create_task(
            follower.generate(greedy("later"), deadline=20, routing=RoutingContext(min_version=1))
        )
        await fleet.publish(tensors(model, 1.5), label="step 8")
        assert (await waiting).version_spans == (VersionSpan(1, 0, 12),)
        await follower.reached(1, deadline=20)
        assert (follower.version, follower.labels) == (1, {1: "step 8"})

        # A request that runs when the owner puts the fleet to sleep comes back aborted, and the follower knows why.
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.05)
        running = asyncio.create_task(follower.generate(greedy("cut", 200), deadline=60))
        sleeping = asyncio.create_task(follower.slept(deadline=60))
        await busy(fleet)
        with pytest.raises(TimeoutError, match="the fleet was not asleep within 0.01 s: embedded-0"):
            await follower.slept(deadline=0.01)
        await fleet.sleep(interrupt=True)
        await sleeping
        assert ((await running).finish_reason, follower.asleep) == (FinishReason.ABORT, True)
        with pytest.raises(NoEngineError, match="asleep"):
            await follower.generate(greedy("asleep"), deadline=0.1)
        await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
        await fleet.publish(tensors(model), label=9)
        await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
        await follower.awake(deadline=20)
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.0)
        made = await follower.generate(greedy("awake"), deadline=20)
        assert (made.output_ids, made.version_spans) == (expected(model), (VersionSpan(2, 0, 12),))
        assert (follower.labels[2], fleet.labels) == (9, {1: "step 8", 2: 9})


async def test_an_engine_that_dies_under_a_follower_comes_back_to_it(tiny_model: Path, tmp_path: Path) -> None:
    async with (
        open_fleet(CONFIG, tiny_model, log_dir=tmp_path, restarts=2) as fleet,
        fleet.share(key=KEY) as shared,
        follow_fleet(shared.url, shared.key) as follower,
    ):
        before = fleet.engines["embedded-0"].url
        with pytest.raises(EngineUnreachable):
            await embedded(fleet)[0].inject_fault("crash")
        await until(lambda: follower.snapshot.get("embedded-0").phase is Phase.DEAD)
        made = await follower.generate(greedy("elsewhere"), deadline=20)
        assert len(made.output_ids) == 12
        await until(lambda: len(follower.snapshot.routable) == 2)
        assert follower.engines["embedded-0"].url == fleet.engines["embedded-0"].url != before
        session = RoutingContext(session="back")
        for turn in range(4):
            await follower.generate(greedy(f"back/{turn}"), deadline=20, routing=session)


async def test_a_follower_goes_on_while_its_owner_is_silent(tiny_model: Path, tmp_path: Path) -> None:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        async with fleet.share() as shared:
            following = follow_fleet(shared.url, shared.key)
            follower = await following.__aenter__()
        try:
            session = RoutingContext(session="one")
            made = await follower.generate(greedy("alone"), deadline=20, routing=session)
            assert len(made.output_ids) == 12
            # The dead engine gets no more requests, although no owner reports its death.
            [home] = [name for name in follower.engines if follower.event_log.metrics.output_tokens[name]]
            [victim] = [engine for engine in embedded(fleet) if engine.name == home]
            with pytest.raises(EngineUnreachable):
                await victim.inject_fault("crash")
            with pytest.raises(EngineUnreachable):
                await follower.generate(greedy("dies"), deadline=20, routing=session)
            assert follower.snapshot.get(home).phase is Phase.SUSPECT
            assert len((await follower.generate(greedy("again"), deadline=20, routing=session)).output_ids) == 12
        finally:
            await following.__aexit__(None, None, None)
