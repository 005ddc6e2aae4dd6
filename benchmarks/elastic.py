"""Measures how long a fleet takes to grow: from the order to the first request that an added engine has answered.

    OMP_NUM_THREADS=1 python -m benchmarks.elastic [--repeats 5]

The engines are embedded ones with a tiny model, and requests run all the time. An engine is added while a published
version is served, which it gets from the other engine. "zero" is a fleet without engines: from a request to its answer.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from millrace.config.engines import EmbeddedEngineConfig, ReplicaRange
from millrace.config.sources import TinyModelConfig
from millrace.fleet.event_log import Outcome
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, SamplingParams

CONFIG = EmbeddedEngineConfig(kind="embedded", threads=1)
CLIENTS = 4
DEADLINE = 120.0


def request() -> GenerateRequest:
    return GenerateRequest((5, 6, 7), SamplingParams(max_new_tokens=16, ignore_eos=True))


@asynccontextmanager
async def busy(fleet: Fleet) -> AsyncIterator[None]:
    """Send requests while the block runs."""

    async def ask() -> None:
        while True:
            await fleet.generate(request(), deadline=DEADLINE)

    tasks = [asyncio.create_task(ask()) for _ in range(CLIENTS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0.002)


async def added(fleet: Fleet) -> tuple[float, float]:
    """Return the seconds until an added engine serves, and until it has answered its first request."""
    async with busy(fleet):
        begun = time.monotonic()
        name = await fleet.add()
        serves = time.monotonic() - begun
        answered = partial(fleet.event_log.metrics.requests.__getitem__, (name, Outcome.FINISHED))
        before = answered()
        await until(lambda: answered() > before)
        seconds = serves, time.monotonic() - begun
    await fleet.remove(name)
    return seconds


async def measure(folder: Path, repeats: int) -> None:
    model = folder / "model"
    make_tiny_model(TinyModelConfig(kind="tiny"), 0, model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tensors: list[tuple[str, torch.Tensor]] = [(name, one.detach() * 1.1) for name, one in loaded.named_parameters()]
    async with open_fleet(CONFIG, model, log_dir=folder) as fleet:
        await fleet.publish(tensors)
        grown = [await added(fleet) for _ in range(repeats)]
    limits = ReplicaRange(min=0, max=1, idle_seconds=0.5)
    woken = []
    async with open_fleet(CONFIG.model_copy(update={"replicas": limits}), model, log_dir=folder) as fleet:
        for _ in range(repeats):
            await until(lambda: not fleet.snapshot.replicas)
            begun = time.monotonic()
            await fleet.generate(request(), deadline=DEADLINE)
            woken.append(time.monotonic() - begun)
    for what, seconds in (
        ("add, until it serves", [serves for serves, _ in grown]),
        ("add, until its first answer", [answer for _, answer in grown]),
        ("zero, until the answer", woken),
    ):
        print(f"{what}: median {statistics.median(seconds):.2f} s, from {min(seconds):.2f} to {max(seconds):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), parser.parse_args().repeats))


if __name__ == "__main__":
    main()
