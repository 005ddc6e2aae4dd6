"""A real training run with all installed trackers, which is interrupted by a signal and then resumed."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.test_loading import VALID
from tests.train.trackers.readers import READERS, Recorded
from tests.train.trackers.test_trackers import INSTALLED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason="no tracker is installed")]


async def train(
    folder: Path, *arguments: str, until: Callable[[str], bool] = lambda _: False, number: int = signal.SIGINT
) -> tuple[int | None, str]:
    """Runs `millrace train`, which gets the signal when `until` is true of a line. Returns its status and output."""
    command = [sys.executable, "-m", "millrace", "train", str(folder / "run.yaml"), "name=run"]
    settings = [f"output_dir={folder}", "engine.replicas=1", "checkpoint.every=1", f"trackers=[{','.join(INSTALLED)}]"]
    root = str(Path(__file__).parents[3] / "src")
    process = await asyncio.create_subprocess_exec(
        *command,
        *settings,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    assert process.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(240):
            while line := (await process.stdout.readline()).decode():
                said += line
                if until(line):
                    process.send_signal(number)
            return await process.wait(), said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
async def test_a_run_that_is_interrupted_and_resumed_is_one_run_at_each_tracker(
    number: int, ends: int, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(VALID)

    def read() -> dict[str, Recorded]:
        return {kind: READERS[kind](tmp_path / "run") for kind in INSTALLED}

    status, said = await train(
        tmp_path, "train.steps=500", until=lambda line: line.startswith("step 3:"), number=number
    )
    assert status == ends, said
    for kind, recorded in read().items():
        assert f"{kind}: " in said  # where the run is
        assert recorded.state == "interrupted", kind
        assert [step for step, _ in recorded.points["train/loss"]][:3] == [1, 2, 3], kind
    done = len(next(iter(read().values())).points["train/loss"])
    status, said = await train(tmp_path, f"train.steps={done + 2}", "--resume")
    assert status == 0, said
    for kind, recorded in read().items():
        assert recorded.runs == 1, kind
        assert recorded.state == "finished" or kind == "trackio", kind  # whose alerts stay
        steps = [step for step, _ in recorded.points["train/loss"]]
        assert sorted(set(steps)) == list(range(1, done + 3)), kind
        assert recorded.points["eval/accuracy"][0][0] == 0, kind
        assert recorded.rows[done + 2][0]["prompt"].startswith("user: "), kind
