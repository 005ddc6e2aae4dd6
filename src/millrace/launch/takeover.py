"""Servers that an earlier process started and this one takes over. Their guards are not children of this process."""

import asyncio
import os
import select
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Self

from millrace.errors import LaunchError
from millrace.launch.process import END_DEADLINE, tail_of


def start_of(pid: int) -> str | None:
    """Return a text that only this process with this id has: the boot's id and the start time. None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{fields[19]}"


class TakenOver:
    """A running server whose guard another process has started. Create it with `find`, and call `end` at the end."""

    def __init__(self, name: str, pid: int, pidfd: int, log_path: Path) -> None:
        self.name, self.pid, self.log_path = name, pid, log_path
        self.hosts: Collection[str] = ()
        self._pidfd = pidfd
        self._ended: asyncio.Event | None = None  # None until a task waits for the end

    @classmethod
    def find(cls, name: str, pid: int, started: str, log_path: Path) -> Self | None:
        """Return the server with this guard, or None if the guard has ended. `started`: its `start_of`."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        if start_of(pid) != started:  # read after pidfd_open, so that the id can't change hands in between
            os.close(pidfd)
            return None
        return cls(name, pid, pidfd, log_path)

    @property
    def running(self) -> bool:
        """Whether the server is running."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    async def wait(self) -> None:
        """Wait until the server has ended."""
        if self._pidfd < 0:
            return
        if self._ended is None:
            self._ended = asyncio.Event()
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)
        await self._ended.wait()

    async def notice(self) -> float:
        """Wait for ever: nothing gives notices of this host."""
        never: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        return await never

    async def avoid(self, host: str, seconds: float) -> None:
        """Do nothing: there is no other host, and this process goes away with this one."""

    async def end(self) -> None:
        """End the server and all its child processes. Does nothing if it has ended.

        Raises LaunchError if the server does not end in time.
        """
        if self._pidfd < 0:
            return
        try:
            self._send(signal.SIGTERM)
            async with asyncio.timeout(END_DEADLINE):
                await self.wait()
        except TimeoutError:
            self._send(signal.SIGKILL)
            await self.wait()
            raise LaunchError(f"{self.name} (process {self.pid}) did not end within {END_DEADLINE:.0f} s") from None
        finally:
            if self._ended is not None:
                asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def describe_end(self) -> str:
        """Return a description of how the server ended. Its status is known only to the process that started it."""
        return f"{self.name} runs" if self.running else f"{self.name} ended"

    def log_tail(self) -> str:
        """Return the last lines of the server's log, below a line with its path."""
        return tail_of(self.log_path)

    def _send(self, signum: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return  # it has ended

    def _on_end(self) -> None:
        assert self._ended is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()
