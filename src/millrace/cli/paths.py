"""Paths on the command line: with `~` and variables, as in the settings. Parsers for typer."""

from pathlib import Path

import typer

from millrace.arguments import expand


def expanded(text: str) -> str:
    """A path, or else a name or a URL. Raises typer.BadParameter for a variable or a home folder that is not known."""
    try:
        return expand(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path(text: str) -> Path:
    """A path that may not exist."""
    return Path(expanded(text))


def existing_folder(text: str) -> Path:
    """Raises typer.BadParameter where there is no folder."""
    folder = path(text)
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is {'not a folder' if folder.exists() else 'not there'}")
    return folder
