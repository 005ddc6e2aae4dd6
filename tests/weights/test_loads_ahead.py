"""Which requests of a publish are under way at the same time: a real engine, and a transport that waits for them."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from millrace.config.engines import EmbeddedEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.errors import EngineFailed, PublishError
from millrace.types import EngineInfo
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.step import StepResult
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket
from millrace.weights.transports.shared_memory import SharedMemoryTransport
from tests.weights.variants import read_folder

BUCKET = 20 * 1024  # bytes
DEADLINE = 60.0


class Meeting(SharedMemoryTransport):
    """Lets the engine answer to a bucket only when the request for the next one is under way, or staging has ended.

    events: what happened, in order. running: how many requests are under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.running = 0
        self.staged_all = False
        self.fails_at: int | None = None

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        for number, bucket in enumerate(super().staged(buckets)):
            self.events.append(("staged", number))
            yield bucket
        self.staged_all = True

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        number = sum(kind == "begun" for kind, _ in self.events)
        self.events.append(("begun", number))
        self.running += 1
        results = await super().load(targets, staged, deadline=deadline)
        if number == self.fails_at:
            results = {name: StepResult(0.0, EngineFailed(name, "it failed")) for name in results}
        while not self.staged_all and ("begun", number + 1) not in self.events and self.fails_at is None:
            await asyncio.sleep(0.001)
        self.running -= 1
        self.events.append(("loaded", number))
        return results


class OneByOne(Meeting):
    """Takes one request at a time."""

    loads_ahead = False

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        assert self.running == 0
        self.fails_at = -1  # nothing to wait for
        return await super().load(targets, staged, deadline=deadline)


async def published(folder: Path, logs: Path, transport: Meeting) -> EngineInfo:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    started = await start(config, LaunchSpec(model_path=folder, log_dir=logs))
    try:
        target = PublishTarget(started.engine, await started.engine.info())
        source = source_of([(name, tensor.to(torch.float32)) for name, tensor in read_folder(folder).items()])
        async with asyncio.timeout(DEADLINE):
            await Publish([target], source, 1, transport, bucket_bytes=BUCKET, deadline=DEADLINE).run()
        return await started.engine.info()
    finally:
        await transport.close()
        await started.end()


async def test_the_next_request_is_under_way_before_the_last_answer(tiny_model: Path, tmp_path: Path) -> None:
    transport = Meeting()
    assert (await published(tiny_model, tmp_path, transport)).weight_version == 1
    events = transport.events
    last = max(number for _, number in events)
    assert last >= 4
    for number in range(2, last + 1):  # there are two slots: the third bucket is staged when the first was loaded
        assert events.index(("loaded", number - 2)) < events.index(("staged", number))
    for number in range(last):
        assert events.index(("begun", number + 1)) < events.index(("loaded", number))


async def test_a_transport_may_take_one_request_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    transport = OneByOne()
    assert (await published(tiny_model, tmp_path, transport)).weight_version == 1


@pytest.mark.parametrize("at", [0, 1, 3])
async def test_no_request_is_under_way_after_a_failure(tiny_model: Path, tmp_path: Path, at: int) -> None:
    transport = Meeting()
    transport.fails_at = at
    with pytest.raises(PublishError, match="it failed"):
        await published(tiny_model, tmp_path, transport)
    assert transport.running == 0
    assert transport.events.count(("begun", at + 2)) == 0
