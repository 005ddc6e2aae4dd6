"""`millrace doctor URL`: the checks that every engine of Millrace's passes, made on a server that runs."""

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
    url: Annotated[str, typer.Argument(help="The server, as http://127.0.0.1:30000.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            parser=existing_folder,
            metavar="FOLDER",
            show_default=False,
            help="The model's folder, whose weights it serves; the default is the one that the server names.",
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            parser=existing_folder,
            metavar="FOLDER",
            show_default=False,
            help="A folder with other weights of the same shapes.",
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Names of checks, as 'pause.*'.")] = "*",
    deadline: Annotated[float, typer.Option(help="Seconds that one check may take.", min=1)] = CHECK_DEADLINE,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Check a running server against Millrace's contract.

    It must be idle, and nobody else may use it meanwhile: it is paused, put to sleep, and its weights are replaced and
    brought back. Keys are read from MILLRACE_ENGINE_API_KEY and MILLRACE_ENGINE_ADMIN_API_KEY.
    The status is 1 where a check failed, or where the server did not come back after one.
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
            console.print(f"not made: {', '.join(skipped)}")
    return made


async def _leave(runner: Runner, kind: Kind) -> None:
    """After Ctrl-C. What is done here takes a while, and a second Ctrl-C ends it."""
    said = f"it may be paused, asleep or hold other weights: start it again, or POST to it {BY_HAND[kind]}"
    task = asyncio.current_task()
    assert task is not None
    # A KeyboardInterrupt, which would come by itself, ends in whatever task it hits.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        print("bringing the server back as it was; Ctrl-C again leaves it as it is", file=sys.stderr, flush=True)
        await runner.leave()
        said = f"{runner.lost}; {said}" if runner.lost else "the server serves as before, with the model's weights"
    except asyncio.CancelledError:
        task.uncancel()  # the first one is asyncio.run's to count
        raise
    finally:
        print(said, file=sys.stderr)


def _line(result: Result) -> str:
    reason = f"\n        {escape(result.reason)}" if result.reason else ""
    return f"[{COLORS[result.outcome]}]{result.outcome:7}[/] {result.check} ({result.seconds:.1f} s){reason}"
