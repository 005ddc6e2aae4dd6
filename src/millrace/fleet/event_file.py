"""The file of a fleet's events: one JSON object a line."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import orjson

from millrace.errors import DataError
from millrace.jsonl import drop_torn_tail

Value = str | int | float | bool | None
logger = logging.getLogger(__name__)


class EventFile:
    """A file that events are appended to. Close it after use. Raises DataError if it can't be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = False  # the file ends in the middle of a line
        self._failed = False  # which was logged
        try:
            drop_torn_tail(path)
            # Reasons quote the servers' answers, so only this user may read the file, as with the engines' logs.
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(f"{path} can't be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def write(self, record: Mapping[str, Value]) -> bool:
        """Write a record as one line with one system call, so that SIGKILL can't cut it.

        Returns whether it was written whole. The first failure is logged.
        """
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if self._torn:
            line = b"\n" + line  # so that the torn line stays on a line of its own
        written, reason = 0, "there is no space for a whole line"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            reason = error.strerror or str(error)
        whole = written == len(line)
        if not whole and not self._failed:
            self._failed = True
            logger.error(
                "%s can't be written: %s; the run continues, and events will be missing from the file",
                self._path,
                reason,
            )
        self._torn = not whole and (written > 0 or self._torn)
        return whole
