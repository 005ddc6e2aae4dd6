"""`millrace doctor URL`: runs the conformance suite against a running server."""

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from millrace.cli.paths import existing_folder
from millrace.cli.status import interruptible
from millrace.conformance import Check, Outcome, Result, Runner, select
from millrace.conformance.attach import BY_HAND, Kind, attach
from millrace.conformance.report import Report, report, to_json
from millrace.conformance.runner import CHECK_DEADLINE
from millrace.http.hosts import require_known

COLORS = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.LACKING: "yellow"}


def doctor(
    url: Annotated[str, typer.Argument(help="URL of the server, such as http://127.0.0.1:30000.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            parser=existing_folder,
            metavar="FOLDER",
            show_default=False,
            help="Folder of the model that the server serves. The default is the folder that the server reports.",
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            parser=existing_folder,
            metavar="FOLDER",
            show_default=False,
            help="Folder with other weights of the same shapes.",
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Pattern of the checks to run, such as 'pause.*'.")] = "*",
    deadline: Annotated[float, typer.Option(help="Maximum seconds for one check.", min=1)] = CHECK_DEADLINE,
    json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Check a running server against Millrace's engine contract.

    The server must be idle, and no other client may use it during the checks. It is paused, put to sleep, and its
    weights are replaced and restored. Keys are read from MILLRACE_ENGINE_API_KEY and MILLRACE_ENGINE_ADMIN_API_KEY.
    The exit status is 1 if a check failed, or if the server did not recover after a check.
    """
    checks = select(only)
    console = Console(quiet=json, highlight=False)
    with interruptible():
        outcome = asyncio.run(_examine(url, model, other, checks, deadline, console))
    if json:
        sys.stdout.write(to_json(outcome).decode())
    if outcome.count(Outcome.FAILED) or outcome.lost:
        raise typer.Exit(1)


async def _examine(
    url: str,
    model: Path | None,
    other: Path | None,
    checks: Sequence[Check],
    deadline: float,
    console: Console,
) -> Report:
    await require_known("URL", [url])
    subject = await attach(url, folder=model, other=other)
    try:
        info = subject.info
        console.print(f"{info.kind} {info.engine_version} serves {escape(info.model_path)}")
        console.print(f"capabilities: {', '.join(sorted(info.capabilities))}\n")
        runner = Runner(subject, deadline=deadline)
        results = []
        try:
            async for result in runner.run(checks):
                results.append(result)
                if not result.skipped:
                    console.print(_line(result), soft_wrap=True)
        except asyncio.CancelledError:
            await _leave(runner, Kind(info.kind))
            raise
        made = report(info, results, runner.lost)
    finally:
        await subject.engine.close()
    counts = ", ".join(f"{made.count(outcome)} {outcome}" for outcome in Outcome)
    console.print(f"\n{counts}, in {made.seconds:.1f} s")
    if made.lost:
        console.print(f"[red]{escape(made.lost)}[/red]", soft_wrap=True)
        if skipped := [result.check for result in made.results if result.skipped]:
            console.print(f"not run: {', '.join(skipped)}")
    return made


async def _leave(runner: Runner, kind: Kind) -> None:
    """Restore the server after Ctrl-C. It takes a while; a second Ctrl-C gives up."""
    outcome = f"the server may be paused, asleep or hold other weights: restart it, or send it POST {BY_HAND[kind]}"
    task = asyncio.current_task()
    assert task is not None
    # Cancel this task. By default, SIGINT raises KeyboardInterrupt in an arbitrary task.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        print("restoring the server; press Ctrl-C again to leave it as it is", file=sys.stderr, flush=True)
        await runner.leave()
        outcome = f"{runner.lost}; {outcome}" if runner.lost else "the server serves the model's weights as before"
    except asyncio.CancelledError:
        task.uncancel()  # asyncio.run counts the first cancellation itself
        raise
    finally:
        print(outcome, file=sys.stderr)


def _line(result: Result) -> str:
    reason = f"\n        {escape(result.reason)}" if result.reason else ""
    return f"[{COLORS[result.outcome]}]{result.outcome:7}[/] {result.check} ({result.seconds:.1f} s){reason}"
