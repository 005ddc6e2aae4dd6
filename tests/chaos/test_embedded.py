"""Random faults hit a fleet in the middle of rollouts and publishes. No sample is lost, doubled or of mixed versions.

Each seed is a run of its own that takes some seconds. Every other run has no store. All but the first are slow tests.
MILLRACE_CHAOS_SEEDS=100 makes 100 runs instead of a few, and pytest's `-s` shows a summary.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import EngineError
from millrace.fleet.local import open_fleet
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from tests.chaos.faults import (
    WAIT,
    Run,
    check,
    cut_connections,
    give_everything_up,
    kill,
    publish,
    refuse_the_next_update,
    slow_down,
    stop_and_go_on,
    until_all_serve,
)
from tests.engines.processes import below
from tests.rollout.test_scheduler import make_runner

SEEDS = int(os.environ.get("MILLRACE_CHAOS_SEEDS", "3"))
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=3, threads=1, faults=True)
GROUPS, SAMPLES = 24, 4
PROBLEMS = list(generate_problems(7, GROUPS))
FAULTS = 4
WHAT: list[Callable[[Run, str], Awaitable[None]]] = [
    kill, stop_and_go_on, cut_connections, slow_down, refuse_the_next_update, give_everything_up
]  # fmt: skip


async def trouble(run: Run, ended: Callable[[], int]) -> None:
    """Injects the faults, spread over the samples' ends. Each happens during a publish or alone."""
    for number in range(1, FAULTS + 1):
        async with asyncio.timeout(WAIT):
            while ended() < number * GROUPS * SAMPLES // (FAULTS + 2) or (name := run.victim()) is None:
                await asyncio.sleep(0.01)
        what = run.draw.choice(WHAT)
        run.happened.append(f"{what.__name__} {name}")
        tasks: list[Awaitable[None]] = [what(run, name)]
        if run.draw.random() < 0.7:
            tasks.append(publish(run, number))
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, EngineError):
                raise result


async def play(seed: int, model_path: Path, place: Path) -> tuple[Counter[SampleStatus], list[str]]:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    samples: list[Sample] = []
    folder = place / "versions" if seed % 2 else None
    async with open_fleet(CONFIG, model_path, log_dir=place, folder=folder, restarts=5) as fleet:
        run = Run(fleet, random.Random(seed), tensors)
        runner = make_runner(fleet, model_path)
        async with RolloutScheduler(runner, SAMPLES) as scheduler, asyncio.timeout(WAIT):
            scheduler.start(((f"g{i}", problem) for i, problem in enumerate(PROBLEMS)), version=0)
            troubles = asyncio.create_task(trouble(run, lambda: scheduler.counts.ended.total()))
            for _ in PROBLEMS:
                samples += (await scheduler.next_group()).samples
            await troubles
        check(run, samples, (f"g{i}-{j}" for i in range(GROUPS) for j in range(SAMPLES)))
        assert scheduler.counts.asked == scheduler.counts.ended.total() == len(samples)
        await publish(run, FAULTS + 1)
        await until_all_serve(run, FAULTS + 1)
    return scheduler.counts.ended, run.happened


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, SEEDS))])
async def test_nothing_is_lost_and_all_come_back(seed: int, tiny_model: Path, tmp_path: Path) -> None:
    before = below(os.getpid())
    ended, happened = await play(seed, tiny_model, tmp_path)
    print(f"seed {seed}: {dict(ended)}; {', '.join(happened)}")
    assert ended == {SampleStatus.FINISHED: GROUPS * SAMPLES}
    assert below(os.getpid()) <= before
