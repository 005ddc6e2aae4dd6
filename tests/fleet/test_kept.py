"""Engines that a fleet started outlive their owner, and end with the last one."""

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import millrace
from millrace.errors import ConfigError, DataError, LaunchError
from millrace.fleet.kept import FILE
from millrace.launch.ports import free_port
from tests.fleet.test_fleet import expected, greedy, tensors, until
from tests.fleet.test_owner_restart import SHARED, Generating, owning, versions
from tests.launch.test_process import alive

CONFIG: dict[str, Any] = {"kind": "embedded", "threads": 1, "start_timeout": 240}


def recorded(folder: Path) -> dict[str, Any]:
    """The engine in the record."""
    [engine] = json.loads((folder / FILE).read_bytes())["engines"].values()
    return dict(engine)


async def test_the_next_owner_takes_the_engine_over(tiny_model: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "kept", free_port("127.0.0.1")
    keep = {"keep_running": str(folder)}
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    async with owning(tiny_model, port, CONFIG, **keep) as first:
        assert await first.read() == {"version": 0, "serves": [0]}
        async with millrace.follow_fleet(f"http://127.0.0.1:{port}", SHARED) as follower:
            generating = Generating(follower)
            assert await first.tell("publish 1.0 step 7") == {"version": 1, "serves": [1]}
            await follower.reached(1, deadline=60)
            assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
            engine = recorded(folder)
            assert (engine["version"], engine["asleep"]) == (1, [])
            with pytest.raises(
                LaunchError, match=f"^process {first.pid} owns the engines that are recorded in {folder};"
            ):
                async with millrace.open_fleet(CONFIG, tiny_model, log_dir=tmp_path, keep_running=folder):
                    pass
            await generating.more()  # one of these may have begun with version 0
            await first.kill()
            assert versions(await generating.more()) == {1}

            # It serves at once, because the first owner attested its version and began no update after that.
            async with owning(tiny_model, port, CONFIG, **keep) as second:
                assert await second.read() == {"version": 1, "serves": [1]}
                assert recorded(folder)["pid"] == engine["pid"]
                assert await second.tell("stop 1.5") == {"stopped": True}
                assert recorded(folder)["version"] is None
                await second.kill()
            assert versions(await generating.more()) == {1}

            # The update that it left open is dropped. Nothing says which weights the engine holds.
            third = millrace.open_fleet(CONFIG, tiny_model, log_dir=tmp_path, keep_running=folder)
            async with third as fleet, fleet.share(port=port, key=SHARED):
                assert not fleet.snapshot.routable
                report = await fleet.publish(tensors(model), label="step 8")
                assert (report.version, fleet.labels) == (2, {1: "step 7", 2: "step 8"})
                await follower.reached(2, deadline=60)
                assert (await follower.generate(greedy("again"), deadline=60)).output_ids == expected(model)
                assert (recorded(folder)["pid"], recorded(folder)["version"]) == (engine["pid"], 2)
                await fleet.sleep()
                assert (recorded(folder)["version"], len(recorded(folder)["asleep"])) == (None, 2)
                await generating.stop()
            assert not alive(engine["pid"])
            assert not (folder / FILE).exists()


async def test_an_engine_ends_if_no_owner_comes_back(tiny_model: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "kept", free_port("127.0.0.1")
    async with owning(tiny_model, port, CONFIG, keep_running=str(folder), orphan_seconds=1.0) as owner:
        await owner.read()
        engine = recorded(folder)
        assert alive(engine["pid"])
        await owner.kill()
    await until(lambda: not alive(engine["pid"]), deadline=60)
    # The next owner starts a new one, and ends it in order.
    async with millrace.open_fleet(CONFIG, tiny_model, log_dir=tmp_path, keep_running=folder) as fleet:
        assert (await fleet.generate(greedy("new"), deadline=60)).output_ids
        assert recorded(folder)["pid"] != engine["pid"]


@pytest.mark.slow
async def test_a_changed_setting_and_an_engine_too_many_end_what_is_there(tiny_model: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "kept", free_port("127.0.0.1")
    async with owning(tiny_model, port, {**CONFIG, "replicas": 2}, keep_running=str(folder)) as owner:
        await owner.read()
        engines = json.loads((folder / FILE).read_bytes())["engines"]
        await owner.kill()
    changed = {**CONFIG, "max_running_requests": 3}
    async with millrace.open_fleet(changed, tiny_model, log_dir=tmp_path, keep_running=folder) as fleet:
        assert [alive(engine["pid"]) for engine in engines.values()] == [False, False]
        assert len(fleet.engines) == 1


async def test_the_next_owner_takes_all_engines_of_an_elastic_fleet_and_no_one_that_has_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder, port = tmp_path / "kept", free_port("127.0.0.1")
    async with owning(
        tiny_model, port, {**CONFIG, "replicas": {"min": 2, "max": 3}}, keep_running=str(folder)
    ) as owner:
        await owner.read()
        engines = json.loads((folder / FILE).read_bytes())["engines"]
        await owner.kill()
    fewer = {**CONFIG, "replicas": {"min": 1, "max": 3, "idle_seconds": 2}}
    async with millrace.open_fleet(fewer, tiny_model, log_dir=tmp_path, keep_running=folder) as fleet:
        assert json.loads((folder / FILE).read_bytes())["engines"].keys() == engines.keys() == fleet.engines.keys()
        assert all(alive(engine["pid"]) for engine in engines.values())
        await until(lambda: len(fleet.engines) == 1, deadline=30)
        assert json.loads((folder / FILE).read_bytes())["engines"].keys() == fleet.engines.keys()
        assert alive(recorded(folder)["pid"])


async def test_what_can_not_be_kept_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}")
    stock = {"kind": "sglang", "device": "cpu"}
    for config, folder, error, says in (
        ({**stock, "urls": ["http://127.0.0.1:9"]}, tmp_path / "a", ConfigError, "for engines that Millrace starts"),
        ({**stock, "nnodes": 2, "tp_size": 2}, tmp_path / "b", ConfigError, "an engine over several nodes"),
        (CONFIG, tmp_path, DataError, rf"{FILE} is not a record of engines \(claim: Field required\); remove it$"),
        (CONFIG, tmp_path / FILE, DataError, "can't be used to keep engines running: "),
    ):
        with pytest.raises(error, match=says):
            async with (
                asyncio.timeout(60),
                millrace.open_fleet(config, tiny_model, log_dir=tmp_path, keep_running=folder),
            ):
                pass
