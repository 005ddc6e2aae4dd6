"""Three hosts lose their network or their power in the middle of rollouts and publishes. No sample is lost or doubled.

Each seed is a run of its own. MILLRACE_CHAOS_SEEDS=20 makes 20 runs, and pytest's `-s` shows a summary.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.errors import EngineError
from millrace.fleet.local import open_fleet
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from tests.chaos.faults import WAIT, Run, check, publish, until_all_serve
from tests.hosts.network import Host, hosts_or_skip
from tests.hosts.test_hosts import keys, start_engine
from tests.rollout.test_scheduler import make_runner

__all__ = ["keys"]  # a fixture

SEEDS = int(os.environ.get("MILLRACE_CHAOS_SEEDS", "2"))
GROUPS, SAMPLES = 16, 4
PROBLEMS = list(generate_problems(7, GROUPS))
FAULTS = 3
LONGEST_CUT = 20.0  # seconds; after 10 s of silence the fleet sends requests to other engines

Fault = Callable[[Run, Host, Path, Path], Awaitable[None]]


async def cut(run: Run, host: Host, model: Path, logs: Path) -> None:
    host.cut()
    await asyncio.sleep(run.draw.uniform(0.1, LONGEST_CUT))  # the time without a network is drawn at random
    host.connect()


async def lose_power(run: Run, host: Host, model: Path, logs: Path) -> None:
    host.end_processes()
    await start_engine(host, model, logs)


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    with hosts_or_skip(3) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_nothing_is_lost_or_doubled_and_all_hosts_come_back(
    seed: int, three_hosts: list[Host], tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    urls = await asyncio.gather(*(start_engine(host, tiny_model, tmp_path) for host in three_hosts))
    config = EmbeddedEngineConfig(kind="embedded", urls=tuple(urls), replicas=3)
    samples: list[Sample] = []
    async with open_fleet(config, tiny_model, log_dir=tmp_path, transport="gloo", restarts=10) as fleet:
        run = Run(fleet, random.Random(seed), tensors)
        by_name = dict(zip(sorted(fleet.engines), three_hosts, strict=True))
        async with RolloutScheduler(make_runner(fleet, tiny_model), SAMPLES) as scheduler, asyncio.timeout(3 * WAIT):
            scheduler.start(((f"g{i}", problem) for i, problem in enumerate(PROBLEMS)), version=0)
            troubles = asyncio.create_task(trouble(run, scheduler, by_name, tiny_model, tmp_path))
            for _ in PROBLEMS:
                samples += (await scheduler.next_group()).samples
            await troubles
        check(run, samples, (f"g{i}-{j}" for i in range(GROUPS) for j in range(SAMPLES)))
        await publish(run, FAULTS + 1)
        await until_all_serve(run, FAULTS + 1)
    ended = Counter(sample.status for sample in samples)
    print(f"seed {seed}: {dict(ended)}; {', '.join(run.happened)}")
    assert ended == {SampleStatus.FINISHED: GROUPS * SAMPLES}


async def trouble(run: Run, scheduler: RolloutScheduler, hosts: dict[str, Host], model: Path, logs: Path) -> None:
    """Inject the faults, spread over the samples' ends. Each happens during a publish or alone."""
    faults: list[Fault] = [cut, lose_power]
    for number in range(1, FAULTS + 1):
        async with asyncio.timeout(2 * WAIT):
            while (
                scheduler.counts.ended.total() < number * GROUPS * SAMPLES // (FAULTS + 2)
                or (name := run.victim()) is None
            ):
                await asyncio.sleep(0.01)
        what = run.draw.choice(faults)
        run.happened.append(f"{what.__name__} {name}")
        tasks = [what(run, hosts[name], model, logs)]
        if run.draw.random() < 0.7:
            tasks.append(publish(run, number))
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, EngineError):
                raise result
