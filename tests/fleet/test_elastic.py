"""A fleet that grows and shrinks by its load, loses engines by notice, and gives joiners the weights of the others."""

import asyncio
import logging
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config.engines import EmbeddedEngineConfig, ReplicaRange
from millrace.errors import EngineRefused, NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.types import FinishReason, Generation, VersionSpan
from tests.engines.processes import below
from tests.fleet.signals import send_signal
from tests.fleet.test_fleet import CONFIG, busy, embedded, expected, greedy, slow_down, tensors

ONE = CONFIG.model_copy(update={"replicas": 1})


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def elastic(least: int, most: int, idle_seconds: float = 2.0) -> EmbeddedEngineConfig:
    """Settings of engines that run two requests at once."""
    limits = ReplicaRange(min=least, max=most, idle_seconds=idle_seconds)
    return EmbeddedEngineConfig(kind="embedded", threads=1, faults=True, max_running_requests=2, replicas=limits)


async def until_serving(fleet: Fleet, count: int, seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while len(fleet.snapshot.routable) != count:
            await asyncio.sleep(0.02)


def scaled(model: PreTrainedModel, folder: Path, scale: float) -> PreTrainedModel:
    other: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    other.load_state_dict(dict(tensors(model, scale)), strict=False)
    return other


def require_whole(made: list[Generation], model: PreTrainedModel, tokens: int) -> None:
    """Every request was answered once, with the tokens of an engine that was never interrupted."""
    assert Counter(one.request_id for one in made).most_common(1)[0][1] == 1
    for one in made:
        assert (one.finish_reason, one.output_ids) == (FinishReason.LENGTH, expected(model, tokens))
        assert len(one.logprobs) == tokens
        assert [(span.start, span.end) for span in one.version_spans][-1][1] == tokens


async def test_a_fleet_grows_while_requests_wait_and_shrinks_to_zero(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The first engine after zero has the published version before its first request, and nothing is left behind."""
    before = below(os.getpid())
    caplog.set_level(logging.INFO)
    async with open_fleet(elastic(0, 2), tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        await fleet.publish(tensors(model, 1.5))
        await slow_down(fleet, 1.0)  # so that they still wait when the second engine is up, on a busy machine too
        asked = [asyncio.create_task(fleet.generate(greedy(f"r{i}", 100), deadline=240)) for i in range(8)]
        await until_serving(fleet, 2)
        assert fleet.size.wanted == 2
        await slow_down(fleet, 0.0)
        require_whole(await asyncio.gather(*asked), scaled(model, tiny_model, 1.5), 100)
        await until_serving(fleet, 0)
        async with asyncio.timeout(30):
            while fleet.snapshot.replicas:
                await asyncio.sleep(0.02)
        assert fleet.size.wanted == 0
        assert fleet.context_length > 0
        made = await fleet.generate(greedy("first"), deadline=90)
        assert (made.output_ids, made.version_spans) == (
            expected(scaled(model, tiny_model, 1.5)),
            (VersionSpan(1, 0, 12),),
        )
        changes = fleet.event_log.metrics.scalings
        assert changes["up", True] >= 2
        assert changes["down", True] >= 2
        assert not changes["up", False]
    assert below(os.getpid()) <= before


@pytest.mark.slow
async def test_a_follower_wakes_a_fleet_without_engines_and_a_publish_does(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    config = elastic(0, 1, idle_seconds=0.5)
    async with open_fleet(config, tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        await until_serving(fleet, 0)
        async with fleet.share() as shared, follow_fleet(shared.url, shared.key) as follower:
            assert follower.context_length == fleet.context_length
            assert len((await follower.generate(greedy("follower"), deadline=90)).output_ids) == 12
            await until_serving(fleet, 0)
            assert (await fleet.publish(tensors(model), deadline=90)).version == 1
            await until_serving(fleet, 0)
            assert (await follower.generate(greedy("after"), deadline=90)).version_spans == (VersionSpan(1, 0, 12),)


async def test_the_last_engine_stays_if_no_other_place_has_its_weights(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    async with open_fleet(elastic(0, 2, idle_seconds=0.5), tiny_model, log_dir=tmp_path) as fleet:
        await fleet.publish(tensors(model))
        await asyncio.sleep(3)  # six times the window
        assert [state.version for state in fleet.snapshot.routable.values()] == [1]
        assert fleet.size.wanted == 1


async def test_a_request_waits_for_the_first_engine_no_longer_than_its_deadline(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that can't start is tried again, and the log says so once."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    async with open_fleet(elastic(0, 1, idle_seconds=0.5), folder, log_dir=tmp_path) as fleet:
        await until_serving(fleet, 0)
        (folder / "config.json").rename(folder / "gone.json")
        with caplog.at_level(logging.WARNING):
            found = asyncio.create_task(fleet.generate(greedy("found"), deadline=240))
            async with asyncio.timeout(120):
                while fleet.event_log.metrics.scalings["up", False] < 2:
                    await asyncio.sleep(0.02)
            with pytest.raises(NoEngineError, match="within 1 s"):
                await fleet.generate(greedy("vain"), deadline=1)
        assert caplog.text.count("tries again to start one") == 1
        (folder / "gone.json").rename(folder / "config.json")
        assert len((await found).output_ids) == 12


async def test_a_preempted_engine_gives_its_requests_to_the_others_at_once_and_is_replaced(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    """Also those of a follower, which come back without a retry."""
    async with (
        open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet,
        fleet.share() as shared,
        follow_fleet(shared.url, shared.key) as follower,
    ):
        await slow_down(fleet, 0.1)
        clients = [fleet, follower] * 4
        asked = [
            asyncio.create_task(client.generate(greedy(f"r{i}", 60), deadline=90)) for i, client in enumerate(clients)
        ]
        await until_each_runs(fleet)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await fleet.preempt("embedded-0", deadline=20.0)
        assert loop.time() - begun < 15
        assert "embedded-0" not in fleet.engines
        await slow_down(fleet, 0.0)
        require_whole(await asyncio.gather(*asked), model, 60)
        assert not any(fleet.event_log.metrics.retries.values())
        assert not any(follower.event_log.metrics.retries.values())
        await until_serving(fleet, 2)
        with pytest.raises(NoEngineError, match="no engine is called"):
            await fleet.preempt("embedded-9")
        await asyncio.sleep(1.5)  # some looks
        assert len(fleet.snapshot.replicas) == 2


async def test_an_engine_that_leaves_is_not_wanted_any_more_until_it_is_out(tiny_model: Path, tmp_path: Path) -> None:
    """Also while its process ends, when its state is dead: an engine that died by itself is still wanted."""
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        for name in ("embedded-1", "embedded-0"):
            removing = asyncio.create_task(fleet.remove(name))
            wanted, phases = [fleet.size.wanted], set[Phase]()
            while not removing.done():
                await asyncio.sleep(0)
                wanted.append(fleet.size.wanted)
                phases |= {state.phase for state in fleet.snapshot.replicas}
            await removing
            assert Phase.DEAD in phases
            assert wanted == sorted(wanted, reverse=True)
        assert fleet.size.wanted == 0


async def test_a_fleet_of_a_fixed_size_wants_as_many_engines_while_one_is_replaced(
    tiny_model: Path, tmp_path: Path
) -> None:
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path) as fleet:
        preempting = asyncio.create_task(fleet.preempt("embedded-0", deadline=60.0))
        most = 0
        while not preempting.done():
            await asyncio.sleep(0)
            most = max(most, fleet.size.wanted)
        await preempting
        assert most == fleet.size.wanted == 1


async def test_the_only_engine_keeps_its_requests_until_its_replacement_serves(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path) as fleet:
        await slow_down(fleet, 0.1)
        asked = asyncio.create_task(fleet.generate(greedy("r", 250), deadline=120))
        await busy(fleet)
        await fleet.preempt("embedded-0", deadline=60.0)
        assert list(fleet.snapshot.routable) == ["embedded-1"]
        require_whole([await asked], model, 250)
        assert not any(fleet.event_log.metrics.retries.values())


@pytest.mark.slow
async def test_all_engines_die_at_once_and_no_sample_is_lost_or_doubled(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    """The limits hold afterwards, although no engine is restarted under its name."""
    async with open_fleet(elastic(2, 2), tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        await fleet.publish(tensors(model, 1.5))
        await slow_down(fleet, 0.05)
        requests = [greedy(f"r{number}", 60) for number in range(8)]
        asked = asyncio.create_task(fleet.generate_all(requests, deadline=120, retries=3))
        await until_each_runs(fleet)
        for name in list(fleet.engines):
            send_signal(fleet, name, signal.SIGKILL)
        await until_serving(fleet, 0)
        require_whole(await asked, scaled(model, tiny_model, 1.5), 60)
        await until_serving(fleet, 2)
        assert [state.version for state in fleet.snapshot.replicas] == [1, 1]


@pytest.mark.slow
async def test_an_engine_that_comes_back_after_a_publish_never_serves_its_old_weights(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    """It is stopped with its host across a publish, and runs on afterwards."""
    async with (
        open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet,
        fleet.share() as shared,
        follow_fleet(shared.url, shared.key) as follower,
    ):
        await fleet.publish(tensors(model), 1)
        async with stopped(fleet, "embedded-0"):
            report = await fleet.publish(tensors(model, 1.5), 2, deadline=6.0)
            assert list(report.failed) == ["embedded-0"]
        assert fleet.snapshot.get("embedded-0").phase is Phase.QUARANTINED
        await until_answers(fleet, "embedded-0")
        for client in (fleet, follower):
            requests = [greedy(f"{type(client).__name__}-{number}") for number in range(8)]
            for made in await client.generate_all(requests, deadline=60):
                assert made.output_ids == expected(scaled(model, tiny_model, 1.5))
                assert made.version_spans == (VersionSpan(2, 0, 12),)
        assert fleet.snapshot.get("embedded-0").phase is Phase.QUARANTINED
        assert not (await fleet.publish(tensors(model, 0.8), 3)).failed
        assert {state.name for state in fleet.snapshot.routable.values()} == {"embedded-1"}
        await fleet.restart("embedded-0")
        made = await fleet.engines["embedded-0"].generate(greedy("back"), deadline=20)
        assert made.output_ids == expected(scaled(model, tiny_model, 0.8))


async def test_a_joiner_gets_the_weights_of_another_engine_which_serves_meanwhile(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The version is in no store, and the trainer can't give it again."""
    caplog.set_level(logging.INFO)
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path) as fleet:
        await fleet.publish(iter(tensors(model, 1.5)), 1)
        await slow_down(fleet, 0.2)
        running = asyncio.create_task(fleet.generate(greedy("running", 200), deadline=60))
        await busy(fleet)
        assert await fleet.add() == "embedded-1"
        assert "embedded-1 got version 1 from embedded-0" in caplog.text
        assert fleet.snapshot.get("embedded-1").version == 1
        assert not running.done()
        made = await fleet.engines["embedded-1"].generate(greedy("joined"), deadline=20)
        assert made.output_ids == expected(scaled(model, tiny_model, 1.5))
        await slow_down(fleet, 0.0)
        assert len((await running).output_ids) == 200


@pytest.mark.slow
async def test_a_joiner_takes_no_weights_that_differ_from_those_that_were_published(
    tiny_model: Path, tmp_path: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The other engine was given other weights behind the fleet's back, under the same version."""
    async with open_fleet(ONE, tiny_model, log_dir=tmp_path) as fleet:
        await fleet.publish(tensors(model, 1.5), 1)
        [peer] = embedded(fleet)
        body = {"model_path": str(tiny_model), "weight_version": "1"}
        await peer._control("/update_weights_from_disk", body)
        with caplog.at_level(logging.WARNING):
            await fleet.add()
        assert "does not get version 1 from embedded-0" in caplog.text
        assert "tensors are not what was sent" in caplog.text
        assert fleet.snapshot.get("embedded-1").version is None
        assert list(fleet.snapshot.routable) == ["embedded-0"]


async def test_a_ticket_is_good_for_one_reading(tiny_model: Path, tmp_path: Path, model: PreTrainedModel) -> None:
    names = [name for name, _ in tensors(model)]
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        giver, taker = embedded(fleet)
        offered = await giver.offer_weights(names)
        assert offered.ticket not in repr(offered)
        await taker.begin_update(1)
        await taker.load(offered, deadline=30)
        with pytest.raises(EngineRefused, match="HTTP 401"):
            await taker.load(offered, deadline=30)
        await taker.rollback()
        with pytest.raises(EngineRefused, match="the model has no tensor other"):
            await taker.begin_update(1)
            await taker.load(await giver.offer_weights(["other"]), deadline=30)
        await taker.rollback()


@pytest.mark.slow
async def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    code = docs.partition("```python\n# elastic.py")[2].partition("```")[0]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=tmp_path, stdout=PIPE)
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert output.decode().splitlines()[-2:] == ["FleetSize(wanted=0, serving=0, starting=0)", "4 tokens"]


@asynccontextmanager
async def stopped(fleet: Fleet, name: str) -> AsyncIterator[None]:
    send_signal(fleet, name, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(fleet, name, signal.SIGCONT)


async def until_answers(fleet: Fleet, name: str) -> None:
    async with asyncio.timeout(30):
        while (await fleet.engines[name].health()).value != "ready":
            await asyncio.sleep(0.05)


async def until_each_runs(fleet: Fleet) -> None:
    async with asyncio.timeout(60):
        for engine in fleet.engines.values():
            while not (await engine.loads()).running_requests:
                await asyncio.sleep(0.01)
