"""Prefill and decode servers outlive their owner together, and the next one takes all of them over."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import millrace
from millrace.config.engines import PrefillDecodeConfig
from millrace.engines.stock.interpreter import StockConfig
from millrace.fleet.kept import FILE
from millrace.launch.ports import free_port
from tests.fleet.prefill_decode import (
    DEADLINE,
    PROMPTS,
    Bounds,
    asking,
    config_on_cpu,
    engine_of,
    generated,
    make_models,
    require_same,
    tensors,
)
from tests.fleet.test_fleet import until
from tests.fleet.test_owner_restart import SHARED, owning
from tests.launch.test_process import alive

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sglang", "vllm"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StockConfig:
    (folder := tmp_path / "nixl").mkdir()
    return config_on_cpu(request, folder).model_copy(update={"prefill_decode": PrefillDecodeConfig()})


def guards(folder: Path) -> Sequence[int]:
    """The guards of the servers in the record."""
    [engine] = json.loads((folder / FILE).read_bytes())["engines"].values()
    return [one["pid"] for one in (engine, *engine["others"])]


async def test_the_next_owner_takes_all_servers_over_or_none(config: StockConfig, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    models, port = make_models(tmp_path / "models"), free_port("127.0.0.1")
    keep: dict[str, Any] = {"keep_running": str(tmp_path / "kept")}
    async with owning(models[0], port, json.loads(config.model_dump_json()), **keep) as first:
        assert await first.read() == {"version": 0, "serves": [0]}
        async with millrace.follow_fleet(f"http://127.0.0.1:{port}", SHARED) as follower:
            assert await first.tell("publish 1.0 step 7") == {"version": 1, "serves": [1]}
            before = guards(tmp_path / "kept")
            assert len(before) == 2
            await follower.reached(1, deadline=DEADLINE)
            made = await generated(follower)
            await first.kill()
            require_same(await generated(follower), made, 1, Bounds())
            async with (
                millrace.open_fleet(config, models[0], log_dir=tmp_path, **keep) as second,
                second.share(port=port, key=SHARED),
            ):
                assert guards(tmp_path / "kept") == before
                assert [state.version for state in second.snapshot.routable.values()] == [1]
                require_same(await generated(second), made, 1, Bounds())
                assert not (await second.publish(tensors(models[1]))).failed
                assert (await follower.generate(asking(PROMPTS[0]), deadline=DEADLINE)).version_spans[0].version == 2
                assert {(await one.info()).weight_version for one in engine_of(second).servers} == {2}
            assert not [pid for pid in before if alive(pid)]

    # One that has lost a server begins anew.
    async with owning(models[0], port, json.loads(config.model_dump_json()), **keep) as third:
        await third.read()
        before = guards(tmp_path / "kept")
        await third.kill()
    os.kill(before[1], signal.SIGTERM)
    await until(lambda: not alive(before[1]), deadline=DEADLINE)
    assert alive(before[0])
    async with millrace.open_fleet(config, models[0], log_dir=tmp_path, **keep) as fourth:
        assert not [pid for pid in before if alive(pid)]
        assert len(await generated(fourth)) == len(PROMPTS)
