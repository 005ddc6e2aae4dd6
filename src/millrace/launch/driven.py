"""A launcher whose work a child process does, its driver: it speaks to a cluster for the fleet's process.

The driver answers the calls `reserve`, `release`, `free_ports`, `start`, `avoid` and `end`, and says how servers stand
(`millrace.launch.calls`). It says again and again whose hosts go away, and in how many seconds. Its first line is
`{"joined": "..."}`, the cluster in words. It ends when its standard input closes, and then ends what it has started.
"""

import asyncio
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from millrace.errors import LaunchError
from millrace.launch.base import Need, Place
from millrace.launch.calls import MOST_BYTES, Caller, ends_within
from millrace.launch.ports import is_here, joined
from millrace.launch.process import END_DEADLINE

JOIN_DEADLINE = 60.0  # seconds to join a cluster, or to start it on this host
CALL_DEADLINE = 150.0  # seconds for a call that has no deadline of its own; the first one waits for a process elsewhere
END_SECONDS = 30.0  # for the end of the driver
OF_A_LOG = re.compile(r"^\[[^]]*\] \S+:\d+: ")  # how a line of Ray's own log begins

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_driver(module: str, arguments: Sequence[str], not_joined: str) -> AsyncIterator["DrivenLauncher"]:
    """Start the driver `module`, and yield its launcher when it has joined its cluster.

    not_joined: what to say if it does not, with `{}` for the driver's last words. Raises LaunchError.
    """
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=MOST_BYTES,
            start_new_session=True,  # Ctrl-C goes only to the fleet's process, which ends its engines first
        )
        launcher = DrivenLauncher(process, errors)
        try:
            await launcher.join(not_joined)
            yield launcher
        finally:
            await launcher.close()


class DrivenLauncher:
    """Places on a cluster. Open it with `open_driver`.

    unwanted: the tasks that give back places which come too late.
    """

    def __init__(self, process: asyncio.subprocess.Process, errors: BinaryIO) -> None:
        assert process.stdin is not None
        self._process, self._errors = process, errors
        self._driver = Caller("its cluster", process.stdin)
        self._servers: dict[tuple[int, int], DrivenServer] = {}
        self._joined = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self.unwanted: set[asyncio.Task[None]] = set()

    async def join(self, not_joined: str) -> None:
        """Wait until the driver has joined the cluster. Raises LaunchError."""
        self._reader = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(JOIN_DEADLINE):
                await self._joined.wait()
        except TimeoutError:
            raise LaunchError(not_joined.format(self._last_words())) from None
        if self._driver.gone is not None:
            raise LaunchError(self._driver.gone)

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence["DrivenPlace"]:
        """Get a place for each node. See `Launcher.reserve`."""
        asked = {"gpus": need.gpus, "cpus": need.cpus, "nodes": nodes, "need": str(need)}
        reserving = asyncio.create_task(
            self.call("reserve", deadline + CALL_DEADLINE, name=name, **asked, deadline=deadline)
        )
        try:
            placed = await asyncio.shield(reserving)
        except asyncio.CancelledError:
            late = asyncio.create_task(self._give_back(reserving))
            self.unwanted.add(late)
            late.add_done_callback(self.unwanted.discard)
            raise
        hosts = [one["host"] for one in placed["places"]]
        if all(is_here(f"http://{joined(host, 80)}") for host in hosts):
            hosts = ["127.0.0.1"] * nodes  # so that no other host reaches the servers
        return [
            DrivenPlace(self, placed["group"], index, host, one["gpus"] if need.gpus else None, one["python"])
            for index, (one, host) in enumerate(zip(placed["places"], hosts, strict=True))
        ]

    async def release(self, places: Sequence[Place]) -> None:
        """Give the places of an engine back. What runs there ends."""
        for place in places:
            assert isinstance(place, DrivenPlace)
            if place.index == 0:
                try:
                    await self.call("release", CALL_DEADLINE, group=place.group)
                except LaunchError:
                    if self._driver.gone is None:  # otherwise the cluster has taken back what its driver had
                        raise
            if (server := self._servers.pop((place.group, place.index), None)) is not None:
                server.stands(False, f"{server.name} was ended", server.log_tail())

    async def _give_back(self, reserving: "asyncio.Task[Any]") -> None:
        """Wait for a reservation whose caller was cancelled, and release its places."""
        with suppress(LaunchError):  # it got nothing, or the cluster is gone
            await self.call("release", CALL_DEADLINE, group=(await reserving)["group"])

    async def call(self, call: str, within: float, **arguments: object) -> Any:
        """Return the driver's answer to a call. Raises LaunchError."""
        return await self._driver.call(call, within, **arguments)

    def started(self, place: "DrivenPlace", name: str) -> "DrivenServer":
        """Return the server that was started at a place."""
        server = self._servers[place.group, place.index] = DrivenServer(name, self, place)
        return server

    async def close(self) -> None:
        """End the driver, and with it what it had started."""
        if not await ends_within(self._process, END_SECONDS):
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader  # which fails all calls
        await asyncio.gather(*self.unwanted)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            match json.loads(line):
                case {"joined": str(cluster)}:
                    self._driver.who = cluster
                    logger.info("engines run on %s", cluster)
                    self._joined.set()
                case {"note": str(note)}:
                    logger.warning("%s", note)
                case {"group": int(group), "index": int(index), "running": bool(running), "end": end, "tail": tail}:
                    if (server := self._servers.get((group, index))) is not None:
                        server.stands(running, end, tail)
                case {"group": int(group), "index": int(index), "leaves": int() | float() as seconds}:
                    if (server := self._servers.get((group, index))) is not None:
                        server.leaves(seconds)
                case {"id": int(), **_rest} as answer:
                    self._driver.answered(answer)
        gone = f"{self._driver.who} is gone{self._last_words()}"
        self._driver.lose(gone)
        self._joined.set()
        for server in self._servers.values():
            server.stands(False, f"{server.name} ended: {gone}", server.log_tail())

    def _last_words(self) -> str:
        """Return the last line that the driver wrote about an error."""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {OF_A_LOG.sub('', lines[-1]).strip()[:300]}" if lines else ""


class DrivenPlace:
    """A place on the cluster."""

    def __init__(
        self, launcher: DrivenLauncher, group: int, index: int, host: str, gpus: str | None, python: str
    ) -> None:
        self.group, self.index = group, index
        self.host, self.gpus, self.python = host, gpus, python
        self._launcher = launcher

    async def free_ports(self, count: int) -> int:
        """Return the first of `count` consecutive ports that are free there."""
        at = {"group": self.group, "index": self.index}
        return int(await self._launcher.call("free_ports", CALL_DEADLINE, **at, host=self.host, count=count))

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> "DrivenServer":
        """Start a command below a guard there. See `Place.start`."""
        server = self._launcher.started(self, name)
        await self._launcher.call(
            "start",
            CALL_DEADLINE,
            group=self.group,
            index=self.index,
            name=name,
            command=list(command),
            log_path=os.path.abspath(log_path),  # noqa: ASYNC240 # it reads the working folder only
            env=dict(env),
            leftovers=list(leftovers),
        )
        return server


class DrivenServer:
    """A server on the cluster, as the driver has last said that it stands."""

    def __init__(self, name: str, launcher: DrivenLauncher, place: DrivenPlace) -> None:
        self.name = name
        self.hosts: Collection[str] = (place.host,)
        self._launcher, self._place = launcher, place
        self._ended = asyncio.Event()
        self._noticed = asyncio.Event()
        self._leaves_at = 0.0  # the end of its host, by time.monotonic, once that is noticed
        self._end = f"{name} runs"
        self._tail = f"nothing is known of its log on {place.host}"

    @property
    def running(self) -> bool:
        """Whether the server runs."""
        return not self._ended.is_set()

    async def wait(self) -> None:
        """Wait until the server has ended."""
        await self._ended.wait()

    async def notice(self) -> float:
        """Wait for a notice that the server's host goes away. Return the seconds until then."""
        await self._noticed.wait()
        return max(self._leaves_at - time.monotonic(), 0.0)

    async def avoid(self, host: str, seconds: float) -> None:
        """Start nothing more on the server's host. See `Server.avoid`."""
        assert host in self.hosts
        at = {"group": self._place.group, "index": self._place.index}
        await self._launcher.call("avoid", CALL_DEADLINE, **at, seconds=seconds)

    async def end(self) -> None:
        """End the server. Raises LaunchError if it does not end in time, or if the cluster does not answer."""
        if self.running:
            at = {"group": self._place.group, "index": self._place.index}
            await self._launcher.call("end", END_DEADLINE + CALL_DEADLINE, **at)

    def describe_end(self) -> str:
        """Return how the server ended, as its host has seen it."""
        return self._end

    def log_tail(self) -> str:
        """Return the last lines of the server's log on its host."""
        return self._tail

    def leaves(self, seconds: float) -> None:
        """Note that the server's host goes away in so many seconds."""
        self._leaves_at = time.monotonic() + seconds
        self._noticed.set()

    def stands(self, running: bool, end: str, tail: str) -> None:
        """Note how the server stands."""
        self._end = end if running or not self.running else f"{end} (on {self._place.host})"
        self._tail = tail or self._tail
        if not running:
            self._ended.set()
