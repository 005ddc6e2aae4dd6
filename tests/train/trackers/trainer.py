"""A trainer that records one step and then waits: `python -m tests.train.trackers.trainer FOLDER KIND`.

It prints the id of the tracker's process."""

import asyncio
import sys
from pathlib import Path

from rich.console import Console

from millrace.train.display import Display
from millrace.train.record import RunFolder
from millrace.train.trackers.recorder import open_trackers
from tests.train.trackers.test_trackers import metrics, settings


async def main() -> None:
    config = settings(Path(sys.argv[1]), sys.argv[2])
    folder, display = RunFolder(config, resume=False), Display(Console(soft_wrap=True))
    with folder.create():
        async with open_trackers(config, folder, resume=False, display=display) as trackers:
            [process] = trackers.processes
            print(process.pid, flush=True)
            trackers.figures(metrics(1))
            await asyncio.sleep(600)


asyncio.run(main())
