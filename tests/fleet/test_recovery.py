"""Engines that die come back with the weights that the others serve. Engines join and leave while requests run."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.errors import EngineUnreachable, LaunchError, NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.fleet.supervisor import FIRST_DELAY, LONGEST_DELAY, delay_before
from millrace.launch.ports import free_port
from millrace.types import FinishReason, Generation, VersionSpan
from tests.engines.processes import below, command_lines
from tests.fleet.signals import send_signal
from tests.fleet.test_fleet import CONFIG, busy, embedded, expected, greedy, slow_down, tensors

ONE = CONFIG.model_copy(update={"replicas": 1})


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


async def last_of(parts: AsyncIterator[Generation]) -> Generation:
    return [made async for made in parts][-1]


async def until_serving(fleet: Fleet, count: int) -> None:
    async with asyncio.timeout(90):
        while sum(state.routable for state in fleet.snapshot.replicas) != count:
            await asyncio.sleep(0.02)


async def crash_the_first(fleet: Fleet) -> None:
    with pytest.raises(EngineUnreachable):
        await embedded(fleet)[0].inject_fault("crash")
    async with asyncio.timeout(10):
        while fleet.snapshot.get("embedded-0").phase is not Phase.DEAD:
            await asyncio.sleep(0.01)


def test_each_restart_waits_longer_up_to_a_cap() -> None:
    delays = [delay_before(attempt) for attempt in range(20)]
    assert delays[:3] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
    assert max(delays) == delays[-1] == LONGEST_DELAY


async def test_requests_go_past_an_engine_that_answers_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.fleet.supervisor.SUSPECT_SECONDS", 1.0)
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path, restarts=1) as fleet:

        async def until(phase: Phase) -> None:
            async with asyncio.timeout(60):
                while fleet.snapshot.get("embedded-0").phase is not phase:
                    await asyncio.sleep(0.02)

        send_signal(fleet, "embedded-0", signal.SIGSTOP)
        await until(Phase.SUSPECT)
        assert "it has not answered for" in fleet.snapshot.describe()
        for number in range(4):
            await fleet.generate(greedy(f"past-{number}"), deadline=20)
        send_signal(fleet, "embedded-0", signal.SIGCONT)
        await until(Phase.READY)


async def test_an_engine_that_is_killed_comes_back_with_what_the_others_serve(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path, folder=tmp_path / "versions", restarts=2) as fleet:
        await fleet.publish(tensors(model, 1.5), 1)
        await crash_the_first(fleet)
        await until_serving(fleet, 1)
        await until_serving(fleet, 2)
        scaled = AutoModelForCausalLM.from_pretrained(tiny_model)
        scaled.load_state_dict(dict(tensors(model, 1.5)), strict=False)
        made = await embedded(fleet)[0].generate(greedy("back"), deadline=20)
        assert (made.output_ids, made.version_spans) == (expected(scaled), (VersionSpan(1, 0, 12),))


async def test_requests_wait_for_the_only_engine_to_come_back_and_not_for_ever(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    async with open_fleet(ONE, folder, log_dir=tmp_path, restarts=2) as fleet:
        await crash_the_first(fleet)
        made = await fleet.generate(greedy("patient"), deadline=60)
        assert made.output_ids == expected(model)
        (folder / "config.json").rename(folder / "gone.json")  # it can't start any more
        await crash_the_first(fleet)
        with pytest.raises(NoEngineError, match=r"no engine is left: embedded-0 \(dead"):
            await fleet.generate(greedy("vain"), deadline=60)


async def test_an_engine_joins_with_the_current_version_and_one_leaves_when_it_is_done(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    before = below(os.getpid())
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        await fleet.publish(tensors(model), 1)
        await embedded(fleet)[0].inject_fault("slow", seconds=0.5)
        running = asyncio.create_task(fleet.generate(greedy("running", 200), deadline=60))
        await busy(fleet)
        assert await fleet.add() == "embedded-1"
        assert fleet.snapshot.get("embedded-1").version == 1
        assert not running.done()
        await embedded(fleet)[0].inject_fault("slow", seconds=0.0)
        leaving = asyncio.create_task(fleet.remove("embedded-0"))
        made = await running
        assert (made.finish_reason, len(made.output_ids)) == (FinishReason.LENGTH, 200)
        await leaving
        assert list(fleet.engines) == ["embedded-1"]
        assert (await fleet.generate(greedy("after"), deadline=20)).version_spans == (VersionSpan(1, 0, 12),)
        assert not (await fleet.publish(tensors(model), 2)).failed
        with pytest.raises(NoEngineError, match="no engine is called embedded-0"):
            await fleet.remove("embedded-0")
        assert await fleet.add() == "embedded-0"
    assert below(os.getpid()) <= before


async def test_a_request_that_does_not_end_in_time_moves_when_its_engine_leaves(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        await slow_down(fleet, 0.2)
        running = [asyncio.create_task(fleet.generate(greedy(f"slow-{i}", 40), deadline=60)) for i in range(2)]
        streamed = asyncio.create_task(last_of(fleet.stream(greedy("stream", 40), deadline=60)))
        await busy(fleet)
        await fleet.remove("embedded-0", deadline=0.5)
        await slow_down(fleet, 0.0)
        for made in [*await asyncio.gather(*running), await streamed]:
            assert (made.finish_reason, made.output_ids) == (FinishReason.LENGTH, expected(model, 40))
            assert len(made.logprobs) == 40
            assert made.version_spans == (VersionSpan(0, 0, 40),)
        assert not any(fleet.event_log.metrics.retries.values())


async def test_the_last_engine_that_leaves_gives_its_tokens_back(tiny_model: Path, tmp_path: Path) -> None:
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path) as fleet:
        await slow_down(fleet, 0.2)
        running = asyncio.create_task(fleet.generate(greedy("slow", 200), deadline=60))
        await busy(fleet)
        await fleet.remove("embedded-0", deadline=0.5)
        made = await running
        assert made.finish_reason is FinishReason.ABORT
        assert 0 < len(made.output_ids) < 200


async def test_a_stopped_engine_leaves_nothing_when_the_fleet_ends(tiny_model: Path, tmp_path: Path) -> None:
    before = below(os.getpid())
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path, restarts=3):
        tree = {pid: command_lines({pid}) for pid in below(os.getpid()) - before}
        pid = next(pid for pid, line in tree.items() if "embedded" in line and "guard.py" not in line)
        os.kill(pid, signal.SIGSTOP)
    assert below(os.getpid()) <= before


async def test_an_engine_without_a_place_in_the_config_is_not_added(tiny_model: Path, tmp_path: Path) -> None:
    config = ONE.model_copy(update={"ports": (free_port("127.0.0.1"),)})
    async with open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        with pytest.raises(LaunchError, match="engine.ports lists 1 engines, and none for one more"):
            await fleet.add()
        assert [state.routable for state in fleet.snapshot.replicas] == [True]
