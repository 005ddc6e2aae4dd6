"""`millrace status`: shows the engines of a running fleet in the terminal."""

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from millrace.cli.status import interruptible
from millrace.errors import MonitorError
from millrace.http.hosts import require_known
from millrace.serve.remote import Remote
from millrace.serve.table import fleet_table
from millrace.serve.view import FleetView

PIPE_WIDTH = 200  # a pipe has no width, and its reader expects lines that are not wrapped
DEADLINE = 5.0  # seconds; the server waits up to 2 s for an engine that does not answer


def status(
    url: Annotated[
        str, typer.Argument(help="URL of the run's metrics, such as http://127.0.0.1:9400.", show_default=False)
    ],
    once: Annotated[bool, typer.Option("--once", help="Print the status once and exit.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.1)] = 1.0,
    events: Annotated[int, typer.Option(help="Number of recent events to show.", min=0, max=50)] = 12,
) -> None:
    """Show the engines and recent events of a run until Ctrl-C. The run says its URL when it starts."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    with interruptible():
        asyncio.run(_watch(Remote(url), console, once=once, interval=interval, events=events))


async def _watch(remote: Remote, console: Console, *, once: bool, interval: float, events: int) -> None:
    try:
        await require_known("URL", [remote.url])
        view = await remote.fetch(deadline=DEADLINE)
        if once:
            console.print(fleet_table(view, events=events))
            return
        if not console.is_terminal:  # a pipe can't be redrawn
            while True:
                console.print(fleet_table(view, events=events))
                await asyncio.sleep(interval)
                view = await remote.fetch(deadline=DEADLINE)
        with Live(fleet_table(view, events=events), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                view, trouble = await _next(remote, view)
                live.update(fleet_table(view, events=events, trouble=trouble), refresh=True)
    finally:
        await remote.close()


async def _next(remote: Remote, last: FleetView) -> tuple[FleetView, str | None]:
    """Return the current view and None, or the last view and an error message if the run does not answer now."""
    try:
        return await remote.fetch(deadline=DEADLINE), None
    except MonitorError as error:
        return last, f"as of {time.time() - last.at:.0f} s ago: {error}"
