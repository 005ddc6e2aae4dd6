"""`millrace view`: the page of runs."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.paths import path
from millrace.cli.status import INTERRUPTED
from millrace.imports import require_modules
from millrace.viewer.server import serve_runs

PORT = 8420


def view(
    runs: Annotated[Path, typer.Argument(parser=path, help="A run's folder, or a folder of runs.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on. Other than loopback, all who reach it can read.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free port.", min=0, max=65535)] = PORT,
) -> None:
    """Show runs in the browser until Ctrl-C: their curves, engines and samples, during a run and after it."""
    require_modules("the page", "duckdb")
    if status := asyncio.run(_view(runs, host, port)):
        raise typer.Exit(status)


async def _view(runs: Path, host: str, port: int) -> int:
    ended: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        asyncio.get_running_loop().add_signal_handler(number, ended.put_nowait, status)
    async with serve_runs(runs, host, port) as url:
        print(f"the page is at {url}", flush=True)
        return await ended.get()
