"""Paths as people write them: with `~`, and with variables of the environment."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def expand(path: str) -> str:
    """The path with a `~` at its start and every `$NAME` and `${NAME}` replaced. A URL keeps all else as it is.

    Raises ValueError for a variable that is not set, and for a user whose home folder is not known.
    """

    def value_of(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} in {path} is not set")
        return os.environ[name]

    replaced = _VARIABLE.sub(value_of, path)
    expanded = os.path.expanduser(replaced)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"the home folder {user} in {path} is not known; set HOME, or write ./{user} for a folder")
    return expanded


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
