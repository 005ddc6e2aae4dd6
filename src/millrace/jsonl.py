"""Files of one JSON object a line, which a run appends to. A full disk or a power cut leaves a torn tail: half a line,
or NULs."""

import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from millrace.errors import DataError

logger = logging.getLogger(__name__)


def drop_torn_tail(path: Path) -> None:
    """Cuts off what lies behind the last whole line, and logs how much that was. A last line that lacks only its end of
    line is kept. Does nothing where there is no such file, or where it is no regular file. Raises OSError."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size, whole = len(content), content.rfind(b"\n") + 1
            line = content[whole:].rstrip(b"\0")
        if whole == size:
            return
        if _is_object(line):
            file.seek(whole + len(line))
            file.write(b"\n")
            whole = file.tell()
        file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())
    if size > whole:
        logger.warning(
            "%s: the end of the file was torn; dropped %d bytes behind its last whole line", path, size - whole
        )


def read_objects(path: Path, key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every line, with its end, and the object in it. Raises DataError, with the file and the line, for what is no JSON
    object with this key, and OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: the line is damaged: {error}") from error
            if not isinstance(value, dict) or key not in value:
                raise DataError(f"{path}:{number}: the line is damaged: it is no JSON object with {key}")
            yield line, value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
