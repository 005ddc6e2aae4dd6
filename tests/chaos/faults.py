"""Faults of fleets in the middle of rollouts and publishes, and the checks of the samples afterwards."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.launch.process import ServerProcess
from millrace.rollout.sample import Sample, SampleStatus
from tests.rollout.test_scheduler import embedded
from tests.weights.faults import Source

WAIT = 120.0  # seconds for any single thing to happen


@dataclass(slots=True)
class Run:
    """A record of the published versions and of the faults that were injected."""

    fleet: Fleet
    draw: random.Random
    tensors: Sequence[tuple[str, torch.Tensor]]
    committed: set[int] = field(default_factory=lambda: {0})
    happened: list[str] = field(default_factory=list)

    def victim(self) -> str | None:
        """Picks an engine that serves, as long as another one is left."""
        serving = [state.name for state in self.fleet.snapshot.replicas if state.routable]
        return self.draw.choice(serving) if len(serving) > 1 else None


def hit(run: Run, name: str, number: signal.Signals) -> int | None:
    """Sends the signal to the engine's own process and returns its id. Returns None if that process has ended, even if
    the fleet has not noticed yet."""
    process = run.fleet.replicas.by_name[name].process
    assert isinstance(process, ServerProcess)
    guard = process._process.pid
    with suppress(FileNotFoundError, ProcessLookupError):
        for engine in Path(f"/proc/{guard}/task/{guard}/children").read_text().split():
            os.kill(int(engine), number)
            return int(engine)
    return None


async def kill(run: Run, name: str) -> None:
    hit(run, name, signal.SIGKILL)


async def stop_and_go_on(run: Run, name: str) -> None:
    if (engine := hit(run, name, signal.SIGSTOP)) is not None:
        await asyncio.sleep(run.draw.uniform(0.1, 1.0))  # the time for which it hangs is drawn at random
        with suppress(ProcessLookupError):  # the fleet may have restarted it
            os.kill(engine, signal.SIGCONT)


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


async def publish(run: Run, version: int, happens: Callable[[], object] = lambda: None) -> None:
    """Publishes a version, and calls `happens` when half of the tensors are on their way. Without a store, engines that
    come back get the tensors from the same source."""
    source = Source(run.tensors, happens)
    try:
        await run.fleet.publish(lambda: source, version, deadline=20)
    except PublishError:
        run.happened.append(f"version {version} reached no engine")
    run.committed.add(version)  # also if the publish failed, since an engine may have got the version before


def check(run: Run, samples: Sequence[Sample], asked: Iterable[str]) -> None:
    """Every sample that was asked for is there once, is finished, and was made by published versions."""
    assert Counter(sample.sample_id for sample in samples) == Counter(asked), run.happened
    for sample in samples:
        assert sample.status is SampleStatus.FINISHED, (sample.reason, run.happened)
        assert sample.episode is not None
        made = sum(span.end - span.start for span in sample.episode.version_spans)
        assert made == int(sample.episode.loss_mask.sum())
        assert {span.version for span in sample.episode.version_spans} <= run.committed, run.happened


async def until_all_serve(run: Run, version: int) -> None:
    """Waits until all engines serve the version and all restarts are over. A restart ends, and is counted, a little
    after its engine serves."""
    began, fleet = time.monotonic(), run.fleet
    while fleet.replicas.coming or not all(m.routable and m.version == version for m in fleet.snapshot.replicas):
        assert time.monotonic() < began + 2 * WAIT, (fleet.snapshot.describe(), run.happened)
        await asyncio.sleep(0.05)
