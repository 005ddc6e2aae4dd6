"""Files in memory that the ranks of an engine write answers to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from millrace.buckets import RankAnswers


class AnswerFiles:
    """Files in memory, one for each rank of the engines on this host. A rank opens its file by path."""

    def __init__(self, ranks: int) -> None:
        self._descriptors = [os.memfd_create("millrace-answer", os.MFD_CLOEXEC) for _ in range(ranks)]

    def __len__(self) -> int:
        return len(self._descriptors)

    def paths(self) -> tuple[str, ...]:
        """Return the path of each file, and forget the last answers."""
        for descriptor in self._descriptors:
            os.ftruncate(descriptor, 0)
        return tuple(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._descriptors)

    def read(self) -> list[bytes]:
        """Return the answer of each rank; empty if there is none."""
        return [os.pread(one, os.fstat(one).st_size, 0) for one in self._descriptors]

    def answers(self) -> RankAnswers:
        """Forget the last answers, and return where the next ones are written and how they are read."""

        async def read(deadline: float) -> list[bytes]:  # noqa: ARG001 (they are in memory)
            return self.read()

        return RankAnswers(self.paths(), read)

    def close(self) -> None:
        """Free the memory."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


class AnswerFilesPool:
    """The answer files of the orders that a server works on, each of which has its own. ranks: of the server."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._made: list[AnswerFiles] = []
        self._free: list[AnswerFiles] = []

    @contextmanager
    def taken(self) -> Iterator[AnswerFiles]:
        """Yield files that no other order uses. They are not used again if the block raises, because ranks that have
        not answered in time may still write to them."""
        if not self._free:
            self._free.append(AnswerFiles(self._ranks))
            self._made.append(self._free[0])
        files = self._free.pop()
        yield files
        self._free.append(files)

    def close(self) -> None:
        """Free the memory."""
        for files in self._made:
            files.close()
        self._made, self._free = [], []
