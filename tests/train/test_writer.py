"""What is written as a run goes: samples and curves in a thread, and everything when the block ends."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from PIL import Image

from millrace.errors import DataError, RolloutError
from millrace.train import writer as module
from millrace.train.advice import Bounds
from millrace.train.metrics import StepMetrics
from millrace.train.record import RunFolder
from millrace.train.sample_files import read_samples
from millrace.train.writer import Writer
from tests.train.test_advice import step
from tests.train.test_samples import CHAT, folder_in, played

EVALUATED = StepMetrics(step=0, weight_version=1, accuracy=0.5)


def writer(folder: RunFolder, *, leads: bool = True) -> Writer:
    return Writer(folder, CHAT, Bounds(8, 0), title="run", leads=leads)


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


async def test_a_run_that_is_cut_off_has_its_samples_its_advice_and_its_curves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_in(tmp_path)
    with folder.create(), pytest.raises(RolloutError, match="cut off"):
        async with writer(folder) as writing:
            writing.add_step(EVALUATED)
            await writing.add_samples(1, [played("a", 1.0)], {})
            writing.add_step(step(1, samples_failed=1), {}, ("s", "it hangs"))
            raise RolloutError("cut off")
    assert [metrics["step"] for metrics in lines(folder.metrics_path)] == [0, 1]
    [advisory] = lines(folder.path / "advice.jsonl")
    assert (advisory["step"], advisory["kind"]) == (1, "samples_failed")
    assert f"{advisory['text']}. {advisory['do']}" in caplog.messages
    assert [sample["sample"] for sample in read_samples(folder.path)] == ["a"]
    with Image.open(folder.path / "curves.png") as curves:
        assert curves.width > 1000
    assert not list(folder.path.glob("**/*.partial"))


async def test_curves_are_drawn_after_the_first_evaluation_and_not_at_every_step(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    with folder.create():
        async with writer(folder) as writing:
            writing.add_step(EVALUATED)
            await writing.done()
            first = (folder.path / "curves.png").stat().st_mtime_ns
            for number in (1, 2, 3):
                writing.add_step(step(number))
            await writing.done()
            assert (folder.path / "curves.png").stat().st_mtime_ns == first
        assert (folder.path / "curves.png").stat().st_mtime_ns > first


async def test_a_file_is_written_while_the_event_loop_goes_on(tmp_path: Path) -> None:
    folder, many = folder_in(tmp_path), [played(f"s-{i}", 1.0) for i in range(500)]
    turns = 0
    with folder.create():
        async with writer(folder) as writing:
            await writing.add_samples(1, many, {})
            done = asyncio.create_task(writing.done())
            while not done.done():
                await asyncio.sleep(0)
                turns += 1
            await done
    assert len(list(read_samples(folder.path))) == 500
    assert turns > 10  # of the loop; it has one or two if it writes the file itself


async def test_what_cant_be_written_is_an_error_before_the_next_step_and_at_the_end(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    with folder.create():
        (folder.path / "samples").touch()
        with pytest.raises(DataError, match=r"step-000001.parquet can't be written"):
            async with writer(folder) as writing:
                await writing.add_samples(1, [played("a", 1.0)], {})
                await writing.add_samples(2, [played("b", 1.0)], {})
        with pytest.raises(DataError, match=r"step-000003.parquet can't be written"):
            async with writer(folder) as writing:
                await writing.add_samples(3, [played("c", 1.0)], {})


async def test_the_error_of_the_run_is_the_one_that_ends_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_in(tmp_path)
    with folder.create():
        (folder.path / "samples").touch()
        with pytest.raises(RolloutError, match="all failed"):
            async with writer(folder) as writing:
                await writing.add_samples(1, [played("a", 1.0)], {})
                raise RolloutError("all failed")
    assert "step-000001.parquet can't be written" in caplog.text


async def test_a_rank_that_does_not_lead_writes_samples_only(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    with folder.create():
        async with writer(folder, leads=False) as writing:
            await writing.add_samples(1, [played("a", 1.0)], {})
            writing.add_step(step(1, samples_failed=1))
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml", "samples"]


async def test_a_resumed_run_goes_on_with_its_curves_and_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in(tmp_path)
    drawn: list[int] = []

    def draw(metrics: Sequence[StepMetrics], title: str) -> bytes:
        drawn.append(len(metrics))
        return b""

    monkeypatch.setattr(module, "draw_curves", draw)
    with folder.create():
        async with writer(folder) as writing:
            for number in range(1, 10):
                writing.add_step(step(number, logprob_gap=0.001 if number <= 5 else 0.5))
        assert not (folder.path / "advice.jsonl").exists()
        async with writer(folder) as writing:
            writing.add_step(step(10, logprob_gap=0.5))
    assert drawn[-1] == 10
    [advisory] = lines(folder.path / "advice.jsonl")
    assert (advisory["step"], advisory["kind"]) == (10, "gap_rising")
