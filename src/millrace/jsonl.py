"""JSONL files that a run appends to.

A full disk or a power cut can leave a torn tail: an incomplete line, or NUL bytes.
"""

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
    """Truncate the file after its last complete line, and log how many bytes were dropped.

    A last line that lacks only its newline is kept. Does nothing if there is no regular file at `path`. Raises OSError.
    """
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
            "%s: the end of the file was torn; dropped %d bytes after its last complete line", path, size - whole
        )


def read_objects(path: Path, key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield every line, newline included, with the object in it.

    Raises DataError, which names file and line, if a line is not a JSON object that has `key`. Raises OSError.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: the line is damaged: {error}") from error
            if not isinstance(value, dict) or key not in value:
                raise DataError(f"{path}:{number}: the line is damaged: it is not a JSON object with {key}")
            yield line, value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
