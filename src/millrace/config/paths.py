"""Types of path settings. `~` and environment variables in them are expanded."""

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


# A path on this host, and a string that is either a path, or a name or URL.
LocalPath = Annotated[Path, BeforeValidator(_expand)]
PathOrName = Annotated[str, BeforeValidator(_expand)]
