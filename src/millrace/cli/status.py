"""How commands end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells count


@contextmanager
def interruptible(say: Callable[[], str] = str) -> Iterator[None]:
    """Ctrl-C ends the command with what is to say then, if anything, and the status that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        said = say()
        print(f"interrupted: {said}" if said else "interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
