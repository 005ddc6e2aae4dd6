"""Measures the cost of faults: the seconds from SIGKILL to serving the current version again, and the share of
throughput that is left while one of four engines is killed each minute.

    OMP_NUM_THREADS=1 python -m benchmarks.faults [--only recovery] [--kinds ...] [--repeats 3] [--minutes 2]

`recovery` runs for each kind of engine. A fleet of one engine serves a published version, its engine is killed, and the
fleet restarts it and loads the version from the store. Each repeat has its own fleet, so that each restart is the first
(after one second).

`throughput` runs the same load twice, once without kills and once with a kill in the middle of each minute. A step of
the engines' model takes 50 ms longer than it would, and each engine runs at most 16 requests. So the engines limit the
rate, not the cores that they share. Only tokens of samples that finished in time count.
"""

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.config.engines import EngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.launch.process import ServerProcess
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.chat import load_chat_format
from millrace.rollout.problems import generate_problems
from millrace.rollout.runner import SampleRunner
from millrace.rollout.sample import SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.rollout.tools import Calculator
from millrace.train.tiny import make_tiny_model
from millrace.types import SamplingParams

START_TIMEOUT, WAIT = 240.0, 300.0  # seconds
ENGINES, AT_A_TIME, STEP = 4, 16, 0.05
GROUPS, SAMPLES, TOKENS = 24, 4, 64  # half as many again in flight as the engines run at a time
NEVER = 1_000_000  # restarts in a row before the fleet gives up on an engine


@dataclass(frozen=True, slots=True)
class Recovered:
    """Seconds of each phase: until the fleet noticed the death, until the new process answered (including the second
    before the first restart), and until it served the published version."""

    noticed: float
    up: float
    caught_up: float

    @property
    def whole(self) -> float:
        return self.noticed + self.up + self.caught_up


@dataclass(frozen=True, slots=True)
class Rate:
    tokens_per_second: float
    ended: dict[str, int]
    retries: int
    kills: int


@contextmanager
def a_place() -> Iterator[tuple[Path, Path]]:
    """Yields the folder of a small model, and a folder for what a fleet writes."""
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 0, model)
        yield model, Path(place)


def kill(fleet: Fleet, name: str) -> None:
    """Sends SIGKILL to the engine's own process, which is the only child of its guard."""
    process = fleet.replicas.by_name[name].process
    assert isinstance(process, ServerProcess)
    guard = process._process.pid
    [engine] = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    os.kill(int(engine), signal.SIGKILL)


async def recover(config: EngineConfig) -> Recovered:
    with a_place() as (model_path, place), EventLog() as event_log:
        model = AutoModelForCausalLM.from_pretrained(model_path)
        tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        folder = place / "versions"
        async with open_fleet(
            config, model_path, log_dir=place, folder=folder, restarts=1, event_log=event_log
        ) as fleet:
            await fleet.publish(tensors, 1)
            assert await fleet._versions.storing.secured() is None
            [name] = fleet.engines
            killed = time.time()
            kill(fleet, name)
            await fleet.replicas.until(lambda: not fleet.snapshot.get(name).routable, WAIT)
            await fleet.replicas.until(lambda: fleet.snapshot.get(name).routable, WAIT)
            assert fleet.snapshot.get(name).version == 1
        came = {str(entry.fields["state"]): entry.at for entry in event_log.newest if entry.kind == "member"}
    dead, up, ready = (came[phase.value] for phase in (Phase.DEAD, Phase.CATCHING_UP, Phase.READY))
    return Recovered(dead - killed, up - dead, ready - up)


def configs() -> dict[str, EngineConfig]:
    return {
        "embedded": EmbeddedEngineConfig(kind="embedded", threads=1),
        "sglang": SGLangEngineConfig(
            kind="sglang", version="0.5.23", device="cpu", threads=1, start_timeout=START_TIMEOUT
        ),
        "vllm": VLLMEngineConfig(kind="vllm", version="0.32.0", device="cpu", threads=1, start_timeout=START_TIMEOUT),
    }


def print_recovery(kinds: Sequence[str], repeats: int) -> None:
    print(f"seconds from SIGKILL to serving the current version, medians of {repeats}")
    for kind in kinds:
        rounds = [asyncio.run(recover(configs()[kind])) for _ in range(repeats)]

        def middle(of: Callable[[Recovered], float], rounds: list[Recovered] = rounds) -> float:
            return statistics.median(map(of, rounds))

        print(
            f"{kind:<8} {middle(lambda r: r.whole):6.2f} s; noticed {middle(lambda r: r.noticed):.3f}, up again "
            f"{middle(lambda r: r.up):.2f}, caught up {middle(lambda r: r.caught_up):.3f}; single rounds "
            f"{', '.join(f'{r.whole:.2f}' for r in rounds)}"
        )


def runner_on(fleet: Fleet, model_path: Path) -> SampleRunner:
    return SampleRunner(
        fleet=fleet,
        chat=load_chat_format(str(model_path), [Calculator().schema]),
        tools={"calculator": Calculator},
        limits=EpisodeLimits(max_turns=2, max_turn_tokens=TOKENS, max_sample_tokens=200, context_length=256),
        sampling=SamplingParams(TOKENS, ignore_eos=True),
        timeout=120.0,
        retries=3,
    )


async def keep_slow(fleet: Fleet) -> None:
    """Slows down every engine, also after it restarts."""
    slowed: dict[str, int] = {}
    while True:
        for name, engine in fleet.engines.items():
            if fleet.snapshot.get(name).routable and slowed.get(name) != id(engine):
                assert isinstance(engine, EmbeddedEngine)
                await engine.inject_fault("slow", seconds=STEP)
                slowed[name] = id(engine)
        await asyncio.sleep(0.02)


async def kill_each_minute(fleet: Fleet, began: float, minutes: float) -> int:
    """Kills one engine in the middle of each minute, in turns. Returns how many it killed."""
    for number in range(round(minutes)):
        await asyncio.sleep(began + 60.0 * number + 30.0 - time.monotonic())
        kill(fleet, list(fleet.engines)[number % ENGINES])
    return round(minutes)


async def load(minutes: float, *, kills: bool) -> Rate:
    config = EmbeddedEngineConfig(
        kind="embedded", replicas=ENGINES, threads=1, faults=True, max_running_requests=AT_A_TIME
    )
    problems = itertools.cycle(generate_problems(0, 256))
    with a_place() as (model_path, place), EventLog() as event_log:
        async with open_fleet(
            config, model_path, log_dir=place, folder=place / "versions", restarts=NEVER, event_log=event_log
        ) as fleet, RolloutScheduler(runner_on(fleet, model_path), SAMPLES) as scheduler:  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(model_path)
            await fleet.publish([(name, parameter.detach()) for name, parameter in model.named_parameters()], 1)
            slow = asyncio.create_task(keep_slow(fleet))
            began, tokens = time.monotonic(), 0
            killing = asyncio.create_task(kill_each_minute(fleet, began, minutes if kills else 0))
            scheduler.start(((f"g{i}", next(problems)) for i in range(GROUPS)), version=1)
            for number in itertools.count(GROUPS):
                group = await scheduler.next_group()
                if time.monotonic() - began > minutes * 60.0:
                    break
                tokens += sum(int(s.episode.loss_mask.sum()) for s in group.samples if s.episode is not None)
                scheduler.start([(f"g{number}", next(problems))], version=1)
            ended = {status.value: scheduler.counts.ended[status] for status in SampleStatus}
            slow.cancel()
            return Rate(tokens / minutes / 60.0, ended, event_log.metrics.retries.total(), await killing)


def print_throughput(minutes: float) -> None:
    calm = asyncio.run(load(minutes, kills=False))
    struck = asyncio.run(load(minutes, kills=True))
    print(f"{ENGINES} embedded engines, {minutes:g} minutes each")
    for what, rate in (("no kill", calm), ("one killed each minute", struck)):
        ended = ", ".join(f"{count} {how}" for how, count in rate.ended.items())
        print(f"{what:<22} {rate.tokens_per_second:7.0f} tokens/s; {ended}; {rate.kills} kills, {rate.retries} retries")
    print(f"share of throughput kept: {struck.tokens_per_second / calm.tokens_per_second:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recovery", "throughput"], help="both, unless this says which")
    parser.add_argument("--kinds", nargs="+", choices=list(configs()), default=list(configs()), help="of recovery")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2.0)
    given = parser.parse_args()
    if given.only != "throughput":
        print_recovery(given.kinds, given.repeats)
    if given.only != "recovery":
        print_throughput(given.minutes)


if __name__ == "__main__":
    main()
