"""On a signal, the config file is read again, and engines join or leave while requests run."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.config.engines import EmbeddedEngineConfig, ReplicaRange
from millrace.config.models import EvaluationConfig, RolloutConfig, RunConfig, TrainConfig
from millrace.config.sources import GeneratedDataConfig, TinyModelConfig
from millrace.errors import ConfigError
from millrace.fleet.local import open_fleet
from millrace.train.resizing import require_only_replicas, resizable
from tests.fleet.test_fleet import greedy

DATA = GeneratedDataConfig(kind="generated", seed=1, problems=4)


def settings(replicas: int | ReplicaRange, lr: float = 1e-3) -> RunConfig:
    return RunConfig(
        name="run",
        model=TinyModelConfig(kind="tiny"),
        engine=EmbeddedEngineConfig(kind="embedded", replicas=replicas, threads=1),
        data=DATA,
        rollout=RolloutConfig(groups_per_step=2, samples_per_group=2, max_turn_tokens=16, max_sample_tokens=160),
        train=TrainConfig(steps=1, lr=lr),
        evaluation=EvaluationConfig(data=DATA),
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_the_fleet_follows_the_file(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = settings(1)
    async with (
        open_fleet(now.engine, tiny_model, log_dir=tmp_path) as fleet,
        resizable(fleet, now, lambda: now),
    ):
        running = asyncio.create_task(fleet.generate(greedy("long", 200), deadline=60))
        now = settings(2)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: len(fleet.snapshot.routable) == 2)
        assert [state.name for state in fleet.snapshot.replicas] == ["embedded-0", "embedded-1"]
        assert len((await running).output_ids) == 200

        now = settings(1, lr=2e-3)
        with caplog.at_level(logging.ERROR):
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "only engine.replicas can change" in caplog.text)
        assert len(fleet.snapshot.routable) == 2

        now = settings(1)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "SIGHUP: the settings were read again, and engine.replicas is 1" in caplog.text)
        assert [state.name for state in fleet.snapshot.replicas] == ["embedded-0"]
        assert len((await fleet.generate(greedy("after"), deadline=20)).output_ids) == 12

        now = settings(ReplicaRange(min=2, max=3))
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: len(fleet.snapshot.routable) == 2)
        now = settings(1)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: [state.name for state in fleet.snapshot.replicas] == ["embedded-0"])
        await asyncio.sleep(1.5)  # some looks at the load
        assert len(fleet.snapshot.replicas) == 1


def test_nothing_else_changes_under_way() -> None:
    require_only_replicas(settings(1), settings(7))
    with pytest.raises(ConfigError, match="but train has changed; restart with --resume to apply all"):
        require_only_replicas(settings(1), settings(1, lr=2e-3))
