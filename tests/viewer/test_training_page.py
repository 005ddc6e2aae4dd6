"""A run serves its page while it is going on, on a port that it chooses itself."""

import asyncio
import io
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from millrace.config.models import RunConfig
from millrace.train.display import Display
from millrace.train.experiment import train
from millrace.train.summary import print_summary
from millrace.viewer import query
from millrace.viewer.details import details, tokens
from millrace.viewer.index import SampleIndex

DEADLINE = 240.0  # seconds for a run of two steps on a busy machine


class Heard(Display):
    """A display that remembers what a run says."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def say(self, text: str) -> None:
        if found := re.match(r"the page of the run is at (http://127\.0\.0\.1:\d+);", text):
            self.url.set_result(found[1])


def config(folder: Path, model: Path) -> RunConfig:
    return RunConfig.model_validate({
        "name": "run", "output_dir": folder, "model": {"kind": "pretrained", "path": str(model)},
        "engine": {"kind": "embedded", "threads": 1}, "data": {"kind": "generated", "seed": 1, "problems": 4},
        "rollout": {"groups_per_step": 1, "samples_per_group": 2, "max_turn_tokens": 8, "max_sample_tokens": 99},
        "train": {"steps": 2, "lr": 1e-3, "threads": 1},
        "evaluation": {"data": {"kind": "generated", "seed": 2, "problems": 2}},
    })  # fmt: skip


async def check_samples(run: Path) -> None:
    """The samples that the run wrote are whole: their tokens make up their text."""
    index = SampleIndex(run / "samples")
    await index.fill()
    assert index.problems == {}
    rows = await index.page(query.where({}), query.page({}))
    assert [row[rows.columns.index("step")] for row in rows.rows] == [2, 2, 1, 1]
    for place in await index.places(query.where({}), 4):
        sample = await index.ask(lambda cursor, place=place: details(cursor, place))  # type: ignore[misc]
        assert sample["messages"][-1]["role"] == "assistant"
        main = await index.ask(lambda cursor, place=place: tokens(cursor, place, 0))  # type: ignore[misc]
        assert sample["problem"].startswith("generated")
        assert sum(main["mask"]) == sample["tokens"] > 0
        assert len(main["pieces"]) == len(main["trainer_logprobs"]) == sample["sequences"][0]["length"]
        assert str(sample["messages"][-1]["content"]) in "".join(main["pieces"])
    await index.close()


async def test_a_run_has_a_page_until_it_ends_and_names_the_command_for_later(tiny_model: Path, tmp_path: Path) -> None:
    display = Heard()
    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(train(config(tmp_path, tiny_model), resume=False, display=display))
        url = await display.url
        async with aiohttp.ClientSession(url) as http:
            async with http.get("/") as response:
                assert "<title>Millrace</title>" in await response.text()
            run: dict[str, Any] = {"step": None}
            while run["step"] is None:
                async with http.get("/api/runs") as response:
                    answer = await response.json()
                [run] = answer["runs"]
            assert answer["live"]
            async with http.get("/fleet") as response:
                assert [engine["name"] for engine in (await response.json())["engines"]] == ["embedded-0"]
            async with http.get("/api/timeline", params={"run": "run"}) as response:
                assert [lane["engine"] for lane in (await response.json())["lanes"]] == ["embedded-0"]
        summary = await running
    assert summary is not None
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(url)
    await check_samples(summary.folder)
    console = Console(file=io.StringIO(), width=200)
    print_summary(summary, console)
    assert f"millrace view {tmp_path}/run shows them in the browser" in console.file.getvalue()  # type: ignore[attr-defined]
