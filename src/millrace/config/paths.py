"""Paths as people write them: with `~`, and with variables of the environment."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from millrace.arguments import expand


def _expand(value: Any) -> Any:
    match value:
        case str():
            return expand(value)
        case Path():
            return Path(expand(str(value)))
    return value


# A path of this host, and text that may be one: a folder, or else a name or a URL.
LocalPath = Annotated[Path, BeforeValidator(_expand)]
PathOrName = Annotated[str, BeforeValidator(_expand)]
