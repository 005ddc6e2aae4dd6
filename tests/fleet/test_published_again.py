"""Without a store, an engine that dies gets the version that it served from the trainer."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.errors import EnginesLost, NoEngineError, PublishError, WeightsChanged
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.fleet.starting import start_all
from millrace.types import ALL_MEMORY, MemoryTag, VersionSpan
from millrace.weights.transports.shared_memory import SharedMemoryTransport
from tests.fleet.signals import kill_engine
from tests.fleet.test_fleet import CONFIG, expected, greedy, tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = CONFIG.model_copy(update={"replicas": 1})
NAME = "embedded-0"
WEIGHTS, CACHE = frozenset({MemoryTag.WEIGHTS}), frozenset({MemoryTag.KV_CACHE})


class Trainer:
    """Weights that change in place, as an optimizer changes them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.asked = 0

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.asked += 1
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter *= 1.25


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One engine without a store. It may die any number of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millrace.fleet.supervisor.FIRST_DELAY", 0.01)
        patch.setattr("millrace.fleet.supervisor.LONGEST_DELAY", 0.1)
        async with open_fleet(ONE, tiny_model, log_dir=tmp_path_factory.mktemp("logs"), restarts=99) as fleet:
            yield fleet


@pytest.fixture
def trainer(tiny_model: Path) -> Trainer:
    return Trainer(AutoModelForCausalLM.from_pretrained(tiny_model))


def following(fleet: Fleet) -> int:
    newest = fleet.event_log.metrics.newest
    assert newest is not None
    return newest + 1


async def kill(fleet: Fleet) -> None:
    """Kills the engine, and returns when the fleet has noticed."""
    kill_engine(fleet, NAME)
    async with asyncio.timeout(20):
        while fleet.snapshot.get(NAME).phase is not Phase.DEAD:
            await asyncio.sleep(0.01)


async def until_up(fleet: Fleet) -> None:
    """Waits until the restart is over, whatever weights the engine has then."""
    async with asyncio.timeout(90):
        while fleet.replicas.coming or not fleet.snapshot.usable:
            await asyncio.sleep(0.02)


async def require_serving(fleet: Fleet, trainer: Trainer, version: int) -> None:
    made = await fleet.generate(greedy("serving"), deadline=60)
    assert made.output_ids == expected(trainer.model)
    assert made.version_spans == (VersionSpan(version, 0, 12),)


async def test_the_same_weights_come_back_under_the_same_version(fleet: Fleet, trainer: Trainer) -> None:
    trainer.step()
    version = following(fleet)
    await fleet.publish(trainer.named, version)
    for _ in range(2):
        asked = trainer.asked
        await kill(fleet)
        await require_serving(fleet, trainer, version)
        assert trainer.asked > asked


async def test_weights_that_have_moved_on_are_not_served_as_the_old_version(
    fleet: Fleet, trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    version = following(fleet)
    await fleet.publish(trainer.named, version)
    trainer.step()
    await kill(fleet)
    with caplog.at_level(logging.WARNING):
        await until_up(fleet)
    assert "tensors have changed since they were published" in caplog.text
    assert fleet.snapshot.get(NAME).version is None
    assert fleet.event_log.metrics.restarts[NAME, False] == 0  # that is no failure of the engine
    await fleet.publish(trainer.named, version + 1)
    await require_serving(fleet, trainer, version + 1)


@pytest.mark.parametrize("error", [WeightsChanged("in the middle of a step"), ZeroDivisionError()], ids=["busy", "bug"])
async def test_a_trainer_may_be_unable_to_give_the_version_now(
    fleet: Fleet, trainer: Trainer, error: Exception
) -> None:
    busy = False

    def ask() -> list[tuple[str, torch.Tensor]]:
        if busy:
            raise error
        return tensors(trainer.model)

    version = following(fleet)
    await fleet.publish(ask, version)
    busy = True
    await kill(fleet)
    await until_up(fleet)
    assert fleet.snapshot.get(NAME).version is None
    busy = False
    await fleet.publish(ask, version + 1)
    await require_serving(fleet, trainer, version + 1)


@pytest.mark.parametrize("moment", ["asleep", "between the wakes", "waking"])
async def test_an_engine_that_dies_in_a_hybrid_step_gets_the_next_version(
    fleet: Fleet, trainer: Trainer, moment: str
) -> None:
    version = following(fleet)
    await fleet.publish(trainer.named, version)
    await fleet.sleep(ALL_MEMORY)
    if moment == "asleep":
        await kill(fleet)
    trainer.step()
    asked = trainer.asked
    if moment == "waking":
        kill_engine(fleet, NAME)
    await fleet.wake(WEIGHTS)
    if moment == "between the wakes":
        await kill(fleet)
    await fleet.publish(trainer.named, version + 1, require_finite=False)  # a check of the values would ask once more
    assert trainer.asked == asked + 1  # the fleet did not ask for the weights before the step
    await fleet.wake(CACHE)
    await require_serving(fleet, trainer, version + 1)
    assert not fleet.snapshot.get(NAME).asleep


async def test_an_engine_that_dies_during_a_publish_gets_that_version(fleet: Fleet, trainer: Trainer) -> None:
    version, struck = following(fleet), 0

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal struck
        for number, entry in enumerate(trainer.named()):
            if number == 5 and struck < 2:
                struck += 1
                kill_engine(fleet, NAME)
            yield entry

    # The check of the values is off, since it would go through the tensors before the transaction.
    report = await fleet.publish(dying, version, bucket_bytes=1, require_finite=False)
    assert (struck, report.version, report.failed) == (2, version, {})
    await require_serving(fleet, trainer, version)
    struck = 1
    with pytest.raises(EnginesLost, match=f"no engine took version {version + 1}"):
        await fleet.publish(dying(), version + 1, bucket_bytes=1)  # an iterator can't be gone through again
    await require_serving(fleet, trainer, version)


async def test_an_added_engine_gets_the_version_too(fleet: Fleet, trainer: Trainer) -> None:
    version = following(fleet)
    trainer.step()
    await fleet.publish(trainer.model.named_parameters, version)
    name = await fleet.add()
    assert fleet.snapshot.get(name).version == version
    await fleet.remove(name)


async def test_wrong_tensors_are_refused_at_once(fleet: Fleet, trainer: Trainer) -> None:
    version = following(fleet)
    for wrong in (trainer.model, trainer.model.state_dict, lambda: None):
        with pytest.raises(PublishError, match="tensors must be pairs of name and tensor, and are of type "):
            await fleet.publish(wrong, version)  # type: ignore[arg-type]


async def test_requests_before_the_first_publish_end_at_once(
    tiny_model: Path,
    tmp_path: Path,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine's weights were never compared with any others. While the engine starts, the log names what it waits
    for."""
    monkeypatch.setattr("millrace.fleet.starting.LOG_SECONDS", 0.2)
    one = start(ONE, LaunchSpec(model_path=tiny_model, log_dir=tmp_path))
    with caplog.at_level(logging.INFO, "millrace.fleet.starting"):
        started = await start_all({NAME: one}, tmp_path)
    told = [record.getMessage() for record in caplog.records if record.name == "millrace.fleet.starting"]
    assert len(told) > 1
    assert re.fullmatch(rf"waiting for {NAME} for \d+ s now; see {tmp_path}/{NAME}.log", told[-1])
    async with Fleet.open(started, SharedMemoryTransport()) as fleet:
        with pytest.raises(NoEngineError, match=r"no engine serves before the first publish.*embedded-0 \(starting"):
            await fleet.generate(greedy("early"), deadline=3600)
        await fleet.sleep(ALL_MEMORY)
        waiting = asyncio.create_task(fleet.generate(greedy("patient"), deadline=60))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        await fleet.wake(WEIGHTS)
        await fleet.publish(trainer.named, 1)
        await fleet.wake(CACHE)
        assert (await waiting).version_spans == (VersionSpan(1, 0, 12),)
