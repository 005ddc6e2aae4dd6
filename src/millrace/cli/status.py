"""Exit status and message of an interrupted command."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

INTERRUPTED = 130  # 128 + SIGINT, the convention of shells


@contextmanager
def interruptible(message: Callable[[], str] = str) -> Iterator[None]:
    """End the command on Ctrl-C with exit status 130, and print `message()` if it is not empty."""
    try:
        yield
    except KeyboardInterrupt:
        text = message()
        print(f"interrupted: {text}" if text else "interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
