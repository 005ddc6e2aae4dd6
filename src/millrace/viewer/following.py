"""Files of JSON lines that another process appends to, read from where the last reading ended."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

LARGEST_READ = 8 * 2**20  # bytes in memory at a time
LAST_BYTES = 4096  # in which the last line is
LONGEST_LINE = 4 * 2**20  # bytes; a longer one is not a line of a run's file


@dataclass(slots=True)
class Follower:
    """Reads the new lines of a file.

    epoch: how often the file was
    replaced or became shorter; the lines of an epoch belong together. more: the last reading did not reach the end of
    the file. broken: lines of the epoch that are not JSON
    objects; first_broken: the number of the first of them.
    """

    path: Path
    epoch: int = 0
    broken: int = 0
    first_broken: int | None = None
    more: bool = False
    changed_at: float = 0.0
    _offset: int = 0
    _lines: int = 0
    _file: int = 0
    _head: bytes = b""
    _rest: bytes = field(default=b"", repr=False)

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return whether a new epoch has begun, and the objects of at most LARGEST_READ new bytes.

        A last line without its end is left for the next time. A missing file has no lines. Raises OSError.
        """
        self.more = False
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return self._replaced() if self._file else False, []
        with file:
            state = self.path.stat()
            head = file.read(len(self._head)) if self._head else b""
            fresh = state.st_ino != self._file or state.st_size < self._offset or head != self._head
            begun = self._replaced() if fresh and self._file else False
            self._file, self.changed_at = state.st_ino, state.st_mtime
            file.seek(self._offset)
            content = file.read(LARGEST_READ)
            if not self._head:
                self._head = content[:256]
        self._offset += len(content)
        self.more = len(content) == LARGEST_READ
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        return begun, [value for line in lines if (value := self._parsed(line)) is not None]

    @property
    def trouble(self) -> str | None:
        """What is wrong with the file, for people; None if nothing is."""
        if not self.broken:
            return None
        lines = "1 line" if self.broken == 1 else f"{self.broken} lines"
        return f"{self.path.name}: {lines} could not be read and were left out, the first is line {self.first_broken}"

    def last(self) -> dict[str, Any] | None:
        """Return the last object of the file, if it is at its end. It need not have been read. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - LAST_BYTES))
            lines = file.read(LAST_BYTES).splitlines()
        try:
            value = orjson.loads(lines[-1]) if lines else None
        except orjson.JSONDecodeError:
            return None
        return value if isinstance(value, dict) else None

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        self._lines += 1
        if not line.strip(b" \r\0"):
            return None
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            return value
        self.broken += 1
        self.first_broken = self.first_broken or self._lines
        return None

    def _replaced(self) -> bool:
        self.epoch += 1
        self.broken, self.first_broken = 0, None
        self._offset, self._lines, self._file, self._head, self._rest = 0, 0, 0, b"", b""
        return True
