"""Answers to the sender: in a file, or in the store of the sender's process group."""

import logging
import os
import threading

from millrace_group import connect
from millrace_receiving import Group

log = logging.getLogger(__name__)

ANSWER = "memfd:millrace-answer"  # what the files for answers are called


def write_answer(path: str, content: bytes) -> None:
    """Write an answer to a file that the sender has made. Does nothing if there is none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.warning("the answer can't be written to %s: %s", path, error.strerror)
        return
    with os.fdopen(descriptor, "wb") as file:
        if ANSWER in os.readlink(f"/proc/self/fd/{descriptor}"):
            file.write(content)
        else:  # the sender is in another container, where its number is another process's
            log.warning("the answer can't be written to %s: it is no file for answers", path)


class AnswerStore:
    """The store of a sender's process group, by a connection of its own: a wait of the group occupies the other one.

    Raises RuntimeError if the store can't be reached.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._store = connect(group.address, group.port, group.world_size, group.seconds)

    def write(self, number: int, content: bytes) -> None:
        """Write this rank's answer about a bucket, and wait until the store has it.

        Raises RuntimeError if the store is gone.
        """
        group = self._group
        key = f"{group.name}/answer/{number}/{group.rank}"
        failed: list[RuntimeError] = []

        def write() -> None:
            try:
                self._store.set(key, content)  # this only sends it
                self._store.check([key])  # the store answers this after it has taken what was sent before
            except RuntimeError as error:
                failed.append(error)

        writing = threading.Thread(target=write, daemon=True)  # it would wait for a sender that has stopped
        writing.start()
        writing.join(group.seconds)
        if failed or writing.is_alive():
            raise failed[0] if failed else RuntimeError(f"the sender did not read it in {group.seconds:.0f} s")
