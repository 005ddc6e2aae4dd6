"""A server process: its start with a log file, its health, and the end of its whole process tree."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, Self

from millrace.errors import LaunchError
from millrace.http.local import lacking
from millrace.http.proxies import reaching_loopback
from millrace.launch import guard
from millrace.launch.account import account_environment

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 16_384
# Servers write UTF-8 to their logs, even if this process's terminal can't show it, and read UTF-8 from models' folders.
LOG_ENCODING = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
# The variables that torchrun sets for one of its ranks.
OF_TORCHRUN = re.compile(
    r"TORCHELASTIC_\w+|MASTER_(ADDR|PORT)|((GROUP_|LOCAL_|ROLE_)?RANK|(GROUP_|LOCAL_|ROLE_)?WORLD_SIZE|ROLE_NAME)"
)
GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL
END_DEADLINE = GRACE_SECONDS + 28.0  # the guard kills processes that ignore SIGTERM, which takes time on a busy machine


def open_private(path: Path) -> BinaryIO:
    """Open a log file for appending. Only its owner can read it, since it may contain users' prompts."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def tail_of(log_path: Path, start: int = 0) -> str:
    """Return the last lines of a log from byte `start` on, below a line with its path."""
    with log_path.open("rb") as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    if not lines:
        return f"it wrote nothing to {log_path}"
    return "\n".join([f"last lines of {log_path}:", *(f"  {line}" for line in lines)])


class Server(Protocol):
    """A server that Millrace started: one process (`ServerProcess`) or several (`millrace.launch.nodes.Nodes`)."""

    @property
    def name(self) -> str:
        """The server's name in messages."""

    @property
    def running(self) -> bool:
        """Whether all of its processes are running."""

    @property
    def hosts(self) -> Collection[str]:
        """The addresses of the hosts that its processes run on, if its launcher has several. Otherwise empty."""

    async def wait(self) -> None:
        """Wait until the server has ended."""

    async def notice(self) -> float:
        """Wait for a notice that the server's host goes away. Return the seconds until then."""

    async def avoid(self, host: str, seconds: float) -> None:
        """Start nothing more on one of `hosts`, which goes away in so many seconds, as a preemption by hand says.

        It may be used again if it has not gone away some time after that. Raises LaunchError if the launcher does not
        answer.
        """

    async def end(self) -> None:
        """End the server. Does nothing if it has ended."""

    def describe_end(self) -> str:
        """Return a description of how the server ended."""

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""


async def until_healthy(server: Server, healthy: Callable[[], Awaitable[bool]], *, deadline: float) -> None:
    """Call `healthy` until it returns true.

    Raises LaunchError, with the end of the log, if the server ends first or after `deadline` seconds.
    """
    try:
        async with asyncio.timeout(deadline):
            while not await healthy():
                if not server.running:
                    raise LaunchError(f"{server.describe_end()}\n{server.log_tail()}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise LaunchError(f"{server.name} was not healthy within {deadline:.0f} s\n{server.log_tail()}") from None


def guarded(command: Sequence[str], *, grace: float, leftovers: Sequence[str] = ()) -> list[str]:
    """Return a command that runs `command` below a guard (`millrace.launch.guard`). `grace` is in seconds."""
    return [sys.executable, "-I", "-S", guard.__file__, str(grace), ",".join(leftovers), *command]


class ServerProcess:
    """One server process below its guard (`millrace.launch.guard`). Create it with `start`, and call `end` at the end.

    process = await ServerProcess.start("engine-0", command, Path("logs/engine-0.log"))
    try:
        await process.until_healthy(answers, deadline=60.0)
        ...
    finally:
        await process.end()
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path, log_start: int) -> None:
        self.name = name
        self.log_path = log_path
        self._log_start = log_start  # where this process's output begins, in bytes; earlier starts wrote before it
        self._process = process
        self.hosts: Collection[str] = ()
        self._kept = False  # whether the server outlives this process

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str] | None = None,
        leftovers: Sequence[str] = (),
    ) -> Self:
        """Start `command` with `env` added to this process's environment. Its output goes to `log_path`.

        What torchrun has set for this process is left out: a server of several ranks would join the trainer's store.

        Calls of the server to its own host use no proxy (`millrace.http.proxies`). `leftovers` are name patterns of
        files that the server leaves in /dev/shm. The guard removes them at the end. Raises LaunchError if this process
        can't start the command.
        """
        inherited = {name: value for name, value in os.environ.items() if not OF_TORCHRUN.fullmatch(name)}
        environment = {**inherited, **account_environment(), **LOG_ENCODING, **(env or {})}
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with open_private(log_path) as log:
                log_start = log.seek(0, os.SEEK_END)
                process = await asyncio.create_subprocess_exec(
                    *guarded(command, grace=GRACE_SECONDS, leftovers=leftovers),
                    stdin=asyncio.subprocess.PIPE,  # the lifeline: it closes when this process dies
                    stdout=log,
                    stderr=log,
                    env=reaching_loopback(environment),
                    start_new_session=True,  # Ctrl-C goes only to the launcher, which ends its servers in order
                )
        except OSError as error:
            raise LaunchError(f"{name} could not be started: {lacking(error) or error}") from error
        return cls(name, process, log_path, log_start)

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.returncode is None

    async def until_healthy(self, healthy: Callable[[], Awaitable[bool]], *, deadline: float) -> None:
        """Call `healthy` until it returns true.

        Raises LaunchError, with the end of the log, if the process ends first or after `deadline` seconds.
        """
        await until_healthy(self, healthy, deadline=deadline)

    @property
    def pid(self) -> int:
        """The id of the guard's process."""
        return self._process.pid

    async def keep(self, claim: str, seconds: float) -> None:
        """Let the server run on if this process dies, without `end`.

        The guard ends it when no process has held this claim (`millrace.launch.claims`) for so many seconds.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{claim} {seconds}\n".encode())
        await self._process.stdin.drain()
        self._kept = True

    async def wait(self) -> None:
        """Wait until the server has ended, by itself or by `end`."""
        await self._process.wait()

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
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._kept and self.running:
            self._process.terminate()
        try:
            async with asyncio.timeout(END_DEADLINE):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise LaunchError(
                f"{self.name} (process {self._process.pid}) did not end within {END_DEADLINE:.0f} s"
            ) from None

    def describe_end(self) -> str:
        """Return a description of how the process ended, such as `engine-0 was killed by SIGSEGV`."""
        code = self._process.returncode
        if code is None:
            return f"{self.name} runs"
        if code > 128:
            return f"{self.name} was killed by {signal.Signals(code - 128).name}"
        return f"{self.name} ended with status {code}"

    def log_tail(self) -> str:
        """Return the last lines that this process wrote to its log, below a line with the log's path."""
        return tail_of(self.log_path, self._log_start)
