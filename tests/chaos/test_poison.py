"""A request kills every engine that reads it. Its sample fails, and the engines come back."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import Replica, start
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import Phase
from millrace.rollout.chat import load_chat_format
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Problem, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.weights.folder import folder_checksums
from tests.chaos.faults import WAIT, Run, until_all_serve
from tests.rollout.test_scheduler import make_runner

CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)
POISON = Problem.of_question("poison", "What is § plus 1?", "1")
PROBLEMS = list(generate_problems(7, 12))
RETRIES = 2


@pytest.mark.slow
async def test_a_poisonous_sample_kills_a_limited_number_of_engines_and_they_come_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    chat = load_chat_format(str(tiny_model))
    poison = chat.tokenizer.encode("§", add_special_tokens=False)

    async def start_one(number: int) -> Replica:
        """Starts an engine. Each of its processes dies of the poisonous request."""
        started = await start(CONFIG, LaunchSpec(model_path=tiny_model, replica=number, log_dir=tmp_path))
        assert isinstance(started.engine, EmbeddedEngine)
        await started.engine.inject_fault("poison", tokens=poison)
        return started

    started = await asyncio.gather(*map(start_one, range(CONFIG.first_replicas)))
    async with Fleet.open(started, None, start=start_one, restarts=5) as fleet:
        await fleet.attest(folder_checksums(tiny_model), 0, tiny_model)
        runner = replace(make_runner(fleet, tiny_model), retries=RETRIES)
        async with RolloutScheduler(runner, samples_per_group=1) as scheduler, asyncio.timeout(WAIT):
            problems = [("poison", POISON), *((f"g{i}", problem) for i, problem in enumerate(PROBLEMS))]
            scheduler.start(problems, version=0)
            groups = [await scheduler.next_group() for _ in problems]
        samples = {sample.group_id: sample for group in groups for sample in group.samples}
        poisonous = samples.pop("poison")
        assert poisonous.status is SampleStatus.FAILED
        assert f"gave up after {RETRIES + 1} attempts: engine embedded-" in str(poisonous.reason)
        assert {sample.status for sample in samples.values()} == {SampleStatus.FINISHED}
        await until_all_serve(Run(fleet, random.Random(0), ()), 0)
        deaths = sum(fleet.event_log.metrics.entered[name, Phase.DEAD] for name in fleet.engines)
        assert deaths == RETRIES + 1
