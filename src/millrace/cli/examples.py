"""`millrace examples`: the examples that come with Millrace."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millrace.cli.paths import path
from millrace.errors import ConfigError

PACKAGED = Path(__file__).parents[1] / "_examples"  # in a wheel
CLONED = Path(__file__).parents[3] / "examples"  # in a clone


def examples(
    name: Annotated[str, typer.Argument(help="The example to copy.", show_default=False)] = "",
    to: Annotated[
        Path | None, typer.Option(parser=path, help="The folder to copy it into; by default this one.")
    ] = None,
) -> None:
    """List the examples, or copy one."""
    folder = PACKAGED if PACKAGED.is_dir() else CLONED
    found = sorted(one.name for one in folder.iterdir() if one.is_dir())
    if not name:
        table = Table.grid(padding=(0, 2))
        for one in found:
            table.add_row(one, Text(_about(folder / one)))
        Console(highlight=False).print(table)
        print("\nmillrace examples NAME copies one")
        return
    if name not in found:
        raise ConfigError(f"there is no example {name!r}; there are {', '.join(found)}")
    copy = (to or Path()) / name
    try:
        shutil.copytree(folder / name, copy, ignore=shutil.ignore_patterns("__pycache__"))
    except FileExistsError:
        raise ConfigError(f"{copy} exists; name another folder by --to") from None
    except OSError as error:
        raise ConfigError(f"{copy} can't be written: {error.strerror}") from error
    print(f"copied to {copy}")
    for config in sorted(copy.glob("*.yaml")):
        if "\nmodel:" in config.read_text():
            print(f"millrace train {config}")


def _about(folder: Path) -> str:
    """Return the first sentence of an example's first file that has one as a comment or docstring."""
    for file in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*.py"))]:
        first = file.read_text().partition("\n")[0]
        if text := first.lstrip('#"').strip(' "'):
            return text.partition(". ")[0].rstrip(".")
    return ""
