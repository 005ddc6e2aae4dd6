"""`millrace ...`. Every error of Millrace's own ends in one message and status 1, Ctrl-C in status 130."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from millrace import __version__
from millrace.cli.doctor import doctor
from millrace.cli.engines import engines_app
from millrace.cli.status import INTERRUPTED
from millrace.config import dump_config, load_config
from millrace.errors import MillraceError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(engines_app, name="engines")
app.command()(doctor)


@app.callback()
def millrace() -> None:
    """Rollouts for reinforcement-learning trainers, served by stock inference engines over HTTP."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's settings, in YAML.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file, as train.lr=1e-5.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and stop; data and model are not looked at.")
    ] = False,
) -> None:
    """Train by GRPO, with rollouts from the engines that the config names."""
    settings = load_config(config, overrides or ())
    if dry_run:
        print(dump_config(settings), end="")
        return
    # Not before: these import torch.
    from transformers.utils import logging as transformers_logging

    from millrace.train.display import Display
    from millrace.train.experiment import train as run_training
    from millrace.train.summary import print_summary

    transformers_logging.disable_progress_bar()
    console = Console()
    try:
        with Display(console).show() as display:
            summary = asyncio.run(run_training(settings, resume=resume, display=display))
    except KeyboardInterrupt:
        print(
            "interrupted: what was started has been ended; --resume goes on from the last checkpoint", file=sys.stderr
        )
        raise typer.Exit(INTERRUPTED) from None
    print_summary(summary, console)


def main() -> None:
    """The entry point of the command `millrace`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
