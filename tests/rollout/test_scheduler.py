"""Samples on real engines that go wrong. Each ends once, and the trained tokens are the sampled ones."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import NoEngineError
from millrace.fleet.client import FleetClient
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.chat import load_chat_format
from millrace.rollout.problems import generate_problems
from millrace.rollout.runner import SampleRunner
from millrace.rollout.sample import Problem, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.tools import Calculator
from millrace.types import ANYWHERE, GenerateRequest, Generation, MemoryTag, RoutingContext, SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROBLEMS = list(generate_problems(0, 40))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared_fleet: Fleet) -> AsyncIterator[Fleet]:
    yield shared_fleet
    for engine in embedded(shared_fleet):
        await engine.inject_fault("slow", seconds=0.0)


@pytest.fixture
def runner(fleet: Fleet, tiny_model: Path) -> SampleRunner:
    return make_runner(fleet, tiny_model)


def make_runner(fleet: FleetClient, model: Path) -> SampleRunner:
    return SampleRunner(
        fleet=fleet,
        chat=load_chat_format(str(model), [Calculator().schema]),
        tools={"calculator": Calculator},
        limits=EpisodeLimits(max_turns=2, max_turn_tokens=24, max_sample_tokens=200, context_length=256),
        sampling=SamplingParams(24, ignore_eos=True),
        timeout=60.0,
        retries=3,
    )


def embedded(fleet: Fleet) -> list[EmbeddedEngine]:
    return [engine for engine in fleet.engines.values() if isinstance(engine, EmbeddedEngine)]


def groups(problems: list[Problem]) -> list[tuple[str, Problem]]:
    return [(f"g{i}", problem) for i, problem in enumerate(problems)]


async def until_generating(fleet: Fleet) -> None:
    async with asyncio.timeout(20):
        while not any([(await engine.loads()).running_requests for engine in embedded(fleet)]):
            await asyncio.sleep(0.01)


async def test_every_sample_ends_once_though_connections_break(fleet: Fleet, runner: SampleRunner) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("drop_connection", count=6)
    async with RolloutScheduler(runner, samples_per_group=4) as scheduler:
        scheduler.start(groups(PROBLEMS), version=0)
        done = [await scheduler.next_group() for _ in PROBLEMS]
    ids = [sample.sample_id for group in done for sample in group.samples]
    assert Counter(ids) == Counter(f"g{i}-{j}" for i in range(len(PROBLEMS)) for j in range(4))
    assert {sample.status for group in done for sample in group.samples} == {SampleStatus.FINISHED}
    assert scheduler.counts.asked == scheduler.counts.ended.total() == len(ids)


async def test_a_sample_that_breaks_too_often_fails_with_its_reason(fleet: Fleet, runner: SampleRunner) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("drop_connection", count=1000)
    async with RolloutScheduler(replace(runner, retries=1), samples_per_group=2) as scheduler:
        scheduler.start(groups(PROBLEMS[:2]), version=0)
        done = [await scheduler.next_group() for _ in range(2)]
    for engine in embedded(fleet):
        await engine.inject_fault("drop_connection", count=0)
    for sample in (sample for group in done for sample in group.samples):
        assert sample.status is SampleStatus.FAILED
        assert (sample.reason or "").startswith("gave up after 2 attempts: engine embedded-")
    assert scheduler.counts.ended[SampleStatus.FAILED] == 4


async def test_a_sample_that_takes_too_long_fails_alone(fleet: Fleet, runner: SampleRunner) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.2)
    async with RolloutScheduler(replace(runner, timeout=0.5), samples_per_group=1) as scheduler:
        scheduler.start(groups(PROBLEMS[:1]), version=0)
        group = await scheduler.next_group()
    assert [(s.status, s.reason) for s in group.samples] == [(SampleStatus.FAILED, "not done within 0.5 s")]


async def test_groups_come_out_as_they_complete_not_as_they_were_started(fleet: Fleet, runner: SampleRunner) -> None:
    await embedded(fleet)[0].inject_fault("slow", seconds=0.2)
    async with RolloutScheduler(runner, samples_per_group=1) as scheduler:
        scheduler.start(groups(PROBLEMS[:2]), version=0)  # each engine gets one
        first = await scheduler.next_group()
        assert scheduler.in_flight == 1
        second = await scheduler.next_group()
    assert {first.group_id, second.group_id} == {"g0", "g1"}


async def test_old_groups_are_given_up_and_aborted_on_the_engines(fleet: Fleet, runner: SampleRunner) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.05)
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler:
        scheduler.start(groups(PROBLEMS[:2]), version=3)
        scheduler.start([("young", PROBLEMS[2])], version=5)
        await until_generating(fleet)
        assert scheduler.cancel_older_than(5) == 2
        old = [await scheduler.next_group() for _ in range(2)]
        assert {s.status for group in old for s in group.samples} == {SampleStatus.ABORTED}
        young = await scheduler.next_group()
    assert {s.status for s in young.samples} == {SampleStatus.FINISHED}
    assert scheduler.counts.ended == {SampleStatus.ABORTED: 4, SampleStatus.FINISHED: 2}
    async with asyncio.timeout(10):
        while any([(await engine.loads()).running_requests for engine in embedded(fleet)]):
            await asyncio.sleep(0.01)


async def test_leaving_the_scheduler_ends_every_sample(fleet: Fleet, runner: SampleRunner) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.1)
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler:
        scheduler.start(groups(PROBLEMS[:4]), version=0)
        await until_generating(fleet)
    assert scheduler.counts.asked == scheduler.counts.ended.total() == 8


class RecordingFleet(Fleet):
    """A fleet that records each generation that it returned."""

    recorded: dict[str, Generation]

    async def generate(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE, retries: int = 0
    ) -> Generation:
        assert routing == RoutingContext(session=request.request_id.partition("/")[0], group=routing.group)
        generation = await super().generate(request, deadline=deadline, routing=routing, retries=retries)
        self.recorded[request.request_id] = generation
        return generation


async def test_the_tokens_of_a_sample_are_those_that_were_sampled(fleet: Fleet, runner: SampleRunner) -> None:
    recording = RecordingFleet(list(fleet.replicas.by_name.values()), fleet._versions.transport)
    recording.recorded = {}
    recording.replicas.snapshot = fleet.snapshot
    async with RolloutScheduler(replace(runner, fleet=recording), samples_per_group=2) as scheduler:
        scheduler.start(groups(PROBLEMS[:8]), version=0)
        done = [await scheduler.next_group() for _ in range(8)]
    for sample in (sample for group in done for sample in group.samples):
        assert sample.episode is not None
        turns = [recording.recorded[f"{sample.sample_id}/{turn}"] for turn in range(sample.episode.turns)]
        sampled = [token for generation in turns for token in generation.output_ids]
        assert np.array(sample.episode.token_ids)[sample.episode.loss_mask].tolist() == sampled
        logprobs = np.concatenate([generation.logprobs for generation in turns])
        np.testing.assert_array_equal(sample.episode.logprobs[sample.episode.loss_mask], logprobs)


async def test_a_killed_engine_costs_no_sample_and_the_last_one_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    config = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)
    async with open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        runner = make_runner(fleet, tiny_model)
        await embedded(fleet)[0].inject_fault("crash", after_tokens=400)
        async with RolloutScheduler(runner, samples_per_group=4) as scheduler:
            scheduler.start(groups(PROBLEMS), version=0)
            done = [await scheduler.next_group() for _ in PROBLEMS]
        assert {s.status for group in done for s in group.samples} == {SampleStatus.FINISHED}
        assert scheduler.counts.asked == scheduler.counts.ended.total() == 4 * len(PROBLEMS)
        assert not fleet.snapshot.get("embedded-0").routable

        await embedded(fleet)[1].inject_fault("crash", after_tokens=400)
        async with RolloutScheduler(runner, samples_per_group=4) as scheduler:
            scheduler.start(groups(PROBLEMS), version=0)
            with pytest.raises(NoEngineError, match="embedded-1 .dead; .*SIGKILL"):
                while True:
                    await scheduler.next_group()


async def test_samples_that_sleep_interrupts_go_on_with_the_next_weights_and_their_time_stands_still(
    fleet: Fleet, runner: SampleRunner, tiny_model: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    [old] = {state.version for state in fleet.snapshot.replicas}
    assert old is not None
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=0.03)
    patient = replace(runner, timeout=4.0, retries=0)
    async with RolloutScheduler(patient, samples_per_group=2) as scheduler:
        scheduler.start(groups(PROBLEMS[:4]), version=old)
        await until_generating(fleet)
        await fleet.sleep(interrupt=True)
        assert scheduler.in_flight == 4
        await asyncio.sleep(patient.timeout)  # the samples must not notice this time
        await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
        await fleet.publish([(name, p.detach() * 1.1) for name, p in model.named_parameters()], old + 1)
        await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.0)
        done = [await scheduler.next_group() for _ in range(4)]
    samples = [sample for group in done for sample in group.samples]
    assert {(sample.status, sample.reason) for sample in samples} == {(SampleStatus.FINISHED, None)}
    versions = {tuple(dict.fromkeys(s.version for s in one.episode.version_spans)) for one in samples if one.episode}
    assert (old, old + 1) in versions
    assert {sample.oldest_version for sample in samples} <= {old, old + 1}


async def test_a_sample_of_weights_with_nan_fails_at_once_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    """Another engine would answer the same, so there is no retry."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach() * float("nan")) for name, parameter in model.named_parameters()]
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        await fleet.publish(tensors, 1, require_finite=False)
        sample = await make_runner(fleet, tiny_model).run("s", "g", PROBLEMS[0])
        assert (sample.status, fleet.event_log.metrics.retries.total()) == (SampleStatus.FAILED, 0)
        assert "the weights of version 1 gave token 0 of request s/0 the logprob nan" in (sample.reason or "")
        assert all(state.routable for state in fleet.snapshot.replicas)
