"""The command `millrace`. An error of Millrace ends it with one message and exit status 1, Ctrl-C with status 130."""

import asyncio
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from millrace import __version__
from millrace.cli.doctor import doctor
from millrace.cli.engines import engines_app
from millrace.cli.examples import examples
from millrace.cli.paths import path
from millrace.cli.serve import serve
from millrace.cli.settings import load_settings
from millrace.cli.sidecar import sidecar
from millrace.cli.status import interruptible
from millrace.cli.view import view
from millrace.cli.watch import status
from millrace.config import RunConfig, dump_config
from millrace.config.describe import describe
from millrace.config.serve import ServeConfig
from millrace.errors import MillraceError
from millrace.imports import missing_extra, passive_threads, without_collecting

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # for all commands
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def millrace(
    version: Annotated[  # its callback does all the work
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Rollouts for reinforcement-learning trainers, served by stock inference engines over HTTP."""


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


@app.command()
def config(
    name: Annotated[
        str,
        typer.Argument(help="A section or a setting, such as rollout, engine.sglang or train.lr.", show_default=False),
    ] = "",
    for_serve: Annotated[bool, typer.Option("--serve", help="The settings of `millrace serve`.")] = False,
) -> None:
    """Print all settings with their types, defaults and meanings."""
    print(describe(name, ServeConfig if for_serve else RunConfig))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(parser=path, help="The run's settings (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that take precedence over the file, such as train.lr=1e-5.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load the data and your own code, print the resolved settings and what was found, and exit.",
        ),
    ] = False,
) -> None:
    """Train a model with GRPO, with rollouts from the engines in the settings."""
    settings = load_settings(config, overrides or ())
    if dry_run:
        _look(settings)
        return
    with interruptible(lambda: "nothing had been started"), without_collecting(), passive_threads():
        # Imported here, since these modules import torch.
        from transformers.utils import logging as transformers_logging

        from millrace.train.display import Display
        from millrace.train.experiment import how_to_go_on
        from millrace.train.experiment import train as run_training
        from millrace.train.stopping import Stop
        from millrace.train.summary import print_summary
        from millrace.train.world import end_rank
    transformers_logging.disable_progress_bar()
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun, only rank 0 prints
    summary, stop = None, Stop()
    with (
        interruptible(lambda: f"the run's processes have been ended; {how_to_go_on(settings)}"),
        Display(console).show() as display,
    ):
        running = run_training(
            settings, resume=resume, display=display, reload=lambda: load_settings(config, overrides or ()), stop=stop
        )
        try:
            summary = asyncio.run(running)
        except asyncio.CancelledError:  # by a signal
            if stop.signal is None:
                raise
    if summary is not None:
        print_summary(summary, console)
    if stop.signal is not None:
        print(f"ended by {stop.signal.name}: {how_to_go_on(settings)}", file=sys.stderr)
        end_rank(128 + stop.signal)
        raise typer.Exit(128 + stop.signal)
    end_rank()


app.command()(serve)
app.command()(view)
app.command()(status)
app.command()(examples)
app.add_typer(engines_app, name="engines")
app.command()(doctor)
app.command()(sidecar)


def _look(settings: RunConfig) -> None:
    """Print the settings as YAML, followed by what was found, as comments."""
    with interruptible(lambda: "nothing had been started"), without_collecting():
        from millrace.train.dry_run import look
    with interruptible(lambda: "nothing had been started"):
        found = asyncio.run(look(settings))
    print(dump_config(settings), end="")
    for line in found:
        print(f"# {line}")


def main() -> None:
    """Run the command `millrace`. This is its entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal's encoding may lack a character of a path or a name
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("local", "starting"):  # the chosen weight transport, and the engines that are still starting
        logging.getLogger(f"millrace.fleet.{name}").setLevel(logging.INFO)
    try:
        app()
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        print(f"error: this command needs an optional dependency: {missing}", file=sys.stderr)
        sys.exit(1)
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
