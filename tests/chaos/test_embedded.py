"""Anything happens to a fleet in the middle of rollouts and publishes; no sample is lost, doubled or of mixed versions.

Each seed is a run of its own, of some seconds. With MILLRACE_CHAOS_SEEDS=100 there are so many instead of a few, and
pytest's `-s` shows what they came to.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import EngineError, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from tests.engines.processes import below, command_lines
from tests.rollout.test_scheduler import embedded, make_runner

SEEDS = int(os.environ.get("MILLRACE_CHAOS_SEEDS", "3"))
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=3, threads=1, faults=True)
GROUPS, SAMPLES = 24, 4
PROBLEMS = list(generate_problems(7, GROUPS))
FAULTS = 4
WAIT = 120.0  # seconds for any single thing to happen


@dataclass(slots=True)
class Run:
    """One seed's run: the truth about what was published, and what was done."""

    fleet: Fleet
    draw: random.Random
    tensors: list[tuple[str, torch.Tensor]]
    committed: set[int] = field(default_factory=lambda: {0})
    happened: list[str] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def victim(self) -> str | None:
        """Some engine that serves, as long as another is left."""
        serving = [member.name for member in self.fleet.snapshot.members if member.routable]
        return self.draw.choice(serving) if len(serving) > 1 else None

    def process(self, name: str) -> int:
        port = self.fleet.engines[name].url.rpartition(":")[2]
        lines = {pid: command_lines({pid}) for pid in below(os.getpid())}
        return next(
            pid for pid, line in lines.items() if f"--port {port}" in line.replace("\0", " ") and "guard.py" not in line
        )


async def kill(run: Run, name: str) -> None:
    os.kill(run.process(name), signal.SIGKILL)


async def stop_and_go_on(run: Run, name: str) -> None:
    pid = run.process(name)
    os.kill(pid, signal.SIGSTOP)
    run.stopped.append(pid)
    await asyncio.sleep(run.draw.uniform(0.1, 1.0))  # how long it hangs is what is drawn
    os.kill(pid, signal.SIGCONT)


async def cut_connections(run: Run, name: str) -> None:
    [engine] = [one for one in embedded(run.fleet) if one.name == name]
    await engine.inject_fault("drop_connection", count=run.draw.randint(1, 5))


async def slow_down(run: Run, name: str) -> None:
    [engine] = [one for one in embedded(run.fleet) if one.name == name]
    await engine.inject_fault("slow", seconds=run.draw.uniform(0.0, 0.05))


async def refuse_the_next_update(run: Run, name: str) -> None:
    [engine] = [one for one in embedded(run.fleet) if one.name == name]
    await engine.inject_fault("refuse_update", count=2)


async def give_everything_up(run: Run, name: str) -> None:
    await run.fleet.engines[name].abort()


WHAT: list[Callable[[Run, str], Awaitable[None]]] = [
    kill, stop_and_go_on, cut_connections, slow_down, refuse_the_next_update, give_everything_up
]  # fmt: skip


async def publish(run: Run, version: int) -> None:
    try:
        await run.fleet.publish(run.tensors, version, deadline=20)
    except PublishError:
        run.happened.append(f"version {version} reached nobody")
    run.committed.add(version)  # also where the publish failed: an engine may have got it before


async def trouble(run: Run, ended: Callable[[], int]) -> None:
    """So many faults, spread over the samples' ends, each beside a publish or alone."""
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
    async with open_fleet(CONFIG, model_path, log_dir=place, folder=place / "versions", restarts=5) as fleet:
        run = Run(fleet, random.Random(seed), tensors)
        runner = make_runner(fleet, model_path)
        async with RolloutScheduler(runner, SAMPLES) as scheduler, asyncio.timeout(WAIT):
            scheduler.start(((f"g{i}", problem) for i, problem in enumerate(PROBLEMS)), version=0)
            troubles = asyncio.create_task(trouble(run, lambda: scheduler.ledger.ended.total()))
            for _ in PROBLEMS:
                samples += (await scheduler.next_group()).samples
            await troubles
        check(samples, run)
        assert scheduler.ledger.asked == scheduler.ledger.ended.total() == len(samples)
        began = time.monotonic()
        await publish(run, FAULTS + 1)
        while not all(member.routable for member in fleet.snapshot.members):
            assert time.monotonic() < began + WAIT, fleet.snapshot.describe()
            await asyncio.sleep(0.05)
        assert {member.version for member in fleet.snapshot.members} == {FAULTS + 1}
    return scheduler.ledger.ended, run.happened


def check(samples: list[Sample], run: Run) -> None:
    ids = Counter(sample.sample_id for sample in samples)
    assert ids == Counter(f"g{i}-{j}" for i in range(GROUPS) for j in range(SAMPLES)), run.happened
    for sample in samples:
        assert sample.status is SampleStatus.FINISHED, (sample.reason, run.happened)
        assert sample.episode is not None
        made = sum(segment.end - segment.start for segment in sample.episode.segments)
        assert made == int(sample.episode.loss_mask.sum())
        assert {segment.version for segment in sample.episode.segments} <= run.committed, run.happened


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_nothing_is_lost_and_all_come_back(seed: int, tiny_model: Path, tmp_path: Path) -> None:
    before = below(os.getpid())
    ended, happened = await play(seed, tiny_model, tmp_path)
    print(f"seed {seed}: {dict(ended)}; {', '.join(happened)}")
    assert ended == {SampleStatus.FINISHED: GROUPS * SAMPLES}
    assert below(os.getpid()) <= before
