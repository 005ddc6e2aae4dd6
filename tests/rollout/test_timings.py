"""Where the time of samples goes, on a real engine."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from millrace.config import EmbeddedEngineConfig
from millrace.config.tasks import EnvironmentConfig
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.rollout.calls import Calls
from millrace.rollout.environment import load_environment
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Sample, SampleStatus, unmarked
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.scoring import RewardFunction, Rewards
from millrace.rollout.timings import Stopwatch
from millrace.rollout.tools import Calculator, ToolCall, answer_tool_call
from millrace.types import GenerateRequest, MemoryTag, SamplingParams
from tests.rollout.test_scheduler import embedded, make_runner

pytestmark = pytest.mark.asyncio(loop_scope="module")

[PROBLEM] = generate_problems(0, 1)
NAP = 0.3
CACHE = frozenset({MemoryTag.KV_CACHE})
ENVIRONMENT = """
import time
from millrace.rollout import Step

class Slow:
    def reset(self, row):
        return "Begin."

    def step(self, action):
        time.sleep(0.3)
        return Step(done=True)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    config = EmbeddedEngineConfig(kind="embedded", threads=1, faults=True)
    async with open_fleet(config, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


async def slow(answer: str) -> float:
    await asyncio.sleep(NAP)
    return 1.0


async def slow_for_a_group(answers: list[str]) -> list[float]:
    await asyncio.sleep(NAP)
    return [1.0 for _ in answers]


def check(sample: Sample, before: float) -> None:
    assert before <= sample.timings.started_at
    assert sample.timings.started_at + sample.timings.seconds <= time.time() + 0.01
    assert all(seconds >= 0 for seconds in sample.timings.parts.values())
    assert sum(sample.timings.parts.values()) <= sample.timings.seconds


async def test_the_parts_are_what_was_waited_for(fleet: Fleet, tiny_model: Path) -> None:
    functions = (RewardFunction.of(slow), RewardFunction.of(slow_for_a_group))
    runner = replace(make_runner(fleet, tiny_model), rewards=Rewards(functions))
    before = time.time()
    async with RolloutScheduler(runner, samples_per_group=2) as scheduler:
        scheduler.start([("g", PROBLEM)], version=0)
        group = await scheduler.next_group()
    for sample in group.samples:
        check(sample, before)
        parts = sample.timings.parts
        assert 2 * NAP <= parts["reward"] < 2 * NAP + 1
        assert parts["generate"] > 0
        assert 0 <= parts["queue"] < 1
        assert {*parts} <= {"queue", "generate", "tools", "reward"}


async def test_a_sleeping_fleet_is_a_pause_for_a_sample_and_a_queue_for_a_request(
    fleet: Fleet, tiny_model: Path
) -> None:
    runner, before = make_runner(fleet, tiny_model), time.time()
    await fleet.sleep(CACHE)
    playing = asyncio.create_task(runner.run("s", "g", PROBLEM))
    asking = asyncio.create_task(fleet.generate(GenerateRequest((1, 2, 3), SamplingParams(4)), deadline=30))
    await asyncio.wait({playing, asking}, timeout=NAP)
    await fleet.wake(CACHE)
    sample, made = await playing, await asking
    check(sample, before)
    assert sample.timings.parts["paused"] >= NAP - 0.1
    assert sample.timings.parts["queue"] < NAP
    assert made.queue_seconds >= NAP - 0.1


async def test_an_environment_has_its_own_part_and_its_first_message_is_in_the_conversation(
    fleet: Fleet, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    config = EnvironmentConfig(path=str(tmp_path / "env.py"), name="Slow")
    runner = replace(make_runner(fleet, tiny_model), environment=load_environment(config, Calls()))
    before = time.time()
    sample = await runner.run("s", "g", PROBLEM)
    assert sample.status is SampleStatus.FINISHED, sample.reason
    check(sample, before)
    assert sample.timings.parts["environment"] >= NAP
    assert [message["content"] for message in sample.conversation[:-1]] == [PROBLEM.question, "Begin."]
    assert [message["role"] for message in sample.conversation] == ["user", "user", "assistant"]


@pytest.mark.parametrize("status", [SampleStatus.FAILED, SampleStatus.ABORTED])
async def test_samples_that_fail_or_are_aborted_say_how_long_they_took(
    fleet: Fleet, tiny_model: Path, status: SampleStatus
) -> None:
    [engine] = embedded(fleet)
    await engine.inject_fault("slow", seconds=0.2)
    failed = status is SampleStatus.FAILED
    runner, before = replace(make_runner(fleet, tiny_model), timeout=NAP if failed else 60.0), time.time()
    async with RolloutScheduler(runner, samples_per_group=1) as scheduler:
        scheduler.start([("g", PROBLEM)], version=0)
        if not failed:
            await asyncio.sleep(NAP)  # as long as it takes; there is no condition
            scheduler.cancel_older_than(1)
        group = await scheduler.next_group()
    await engine.inject_fault("slow", seconds=0.0)
    [sample] = group.samples
    assert sample.status is status
    check(sample, before)
    assert sample.timings.seconds >= NAP - 0.01
    assert sample.conversation == PROBLEM.messages


async def test_a_tool_is_timed_and_its_error_is_marked() -> None:
    good = await answer_tool_call(ToolCall("calculator", {"expression": "1+1"}), {"calculator": Calculator()})
    bad = await answer_tool_call(ToolCall("calculator", {"expression": "x"}), {"calculator": Calculator()})
    assert good.message == {"role": "tool", "content": "2", "name": "calculator"}
    assert bad.message["error"] is True
    assert unmarked([good.message, bad.message]) == [
        good.message, {"role": "tool", "content": bad.text, "name": "calculator"},
    ]  # fmt: skip
    assert 0 < good.seconds < 1


async def test_a_stopwatch_adds_up_what_has_one_name() -> None:
    watch, other = Stopwatch(), Stopwatch()
    for one in (watch, other):
        one.count("a", 1.5)
    watch.add(other)
    assert watch.timings().parts == {"a": 3.0}
