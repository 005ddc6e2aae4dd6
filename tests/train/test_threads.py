"""How many CPU threads the trainer uses."""

import os
from pathlib import Path

import pytest

from millrace.config.engines import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig
from millrace.config.models import TrainConfig
from millrace.train.threads import busy_threads, trainer_threads
from tests.train.test_own_rewards import settings

CORES = len(os.sched_getaffinity(0))
TWO = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=3)


@pytest.mark.parametrize(
    ("mode", "engine", "busy"),
    [
        ("hybrid", TWO, 0),
        ("standalone", TWO, 6),
        ("standalone", EmbeddedEngineConfig(kind="embedded", replicas=2), 2),
        ("standalone", SGLangEngineConfig(kind="sglang", replicas=4), 0),
        ("standalone", SGLangEngineConfig(kind="sglang", replicas=4, device="cpu"), 4),
        ("standalone", SGLangEngineConfig(kind="sglang", device="cpu", urls=("http://127.0.0.1:1",)), 0),
    ],
)
def test_engines_are_busy_if_they_run_on_the_cpu_during_training(
    tmp_path: Path, mode: str, engine: EngineConfig, busy: int
) -> None:
    assert busy_threads(settings(tmp_path, {"name": "apples"}, mode=mode, engine=engine)) == busy


def test_auto_takes_the_free_cores_and_gives_way_to_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = settings(tmp_path, {"name": "apples"})
    standalone = settings(tmp_path, {"name": "apples"}, mode="standalone", engine=TWO)
    three = settings(tmp_path, {"name": "apples"}, train=TrainConfig(steps=1, lr=1e-3, threads=3))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert trainer_threads(hybrid) == CORES
    assert trainer_threads(standalone) == max(1, CORES - 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert trainer_threads(hybrid) is None
    assert trainer_threads(three) == 3
