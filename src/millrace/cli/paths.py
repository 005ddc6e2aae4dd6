"""Typer parsers for paths on the command line. `~` and environment variables are expanded, as in the settings."""

from pathlib import Path

import typer

from millrace.arguments import expand


def expanded(text: str) -> str:
    """Return a path, name or URL with `~` and variables expanded.

    Raises typer.BadParameter if a variable or a home folder is unknown.
    """
    try:
        return expand(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path(text: str) -> Path:
    """Return a path, which need not exist. Raises typer.BadParameter as `expanded` does."""
    return Path(expanded(text))


def existing_folder(text: str) -> Path:
    """Return the path of a folder. Raises typer.BadParameter if there is no folder at the path."""
    folder = path(text)
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder
