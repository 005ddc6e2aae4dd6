"""The launcher on a Ray cluster, in the fleet's process: calls to its driver process, places and servers."""

import asyncio
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from millrace.errors import ConfigError, LaunchError
from millrace.imports import require_modules
from millrace.launch.base import Need, Place
from millrace.launch.ports import is_here, joined, listens, parted
from millrace.launch.process import END_DEADLINE

JOIN_DEADLINE = 60.0  # seconds to join a cluster, or to start Ray on this host
CALL_DEADLINE = 150.0  # seconds for a call that has no deadline of its own; the first one waits for the actor's process
END_SECONDS = 30.0  # for Ray's own end, if it was started here
MOST_BYTES = 2**24  # in a line of the driver
OF_A_LOG = re.compile(r"^\[[^]]*\] \S+:\d+: ")  # how a line of Ray's own log begins

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_ray(cluster: str | None) -> AsyncIterator["RayLauncher"]:
    """Join the Ray cluster at `cluster`, at RAY_ADDRESS or on this host, or start Ray on this host for the time being.

    Raises ConfigError if Ray is not installed or the address is not one of a cluster, and LaunchError if it can't be
    joined.
    """
    require_modules("engine.launch: ray", "ray")
    address = cluster or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != "auto":
        await _require_answer(address)
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.launch.ray_cluster.driver", *([address] if address else [])),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=MOST_BYTES,
            start_new_session=True,  # Ctrl-C goes only to the fleet's process, which ends its engines first
        )
        launcher = RayLauncher(process, errors)
        try:
            await launcher.join()
            yield launcher
        finally:
            await launcher.close()


async def _require_answer(address: str) -> None:
    host, port = "", 0
    with suppress(ValueError):
        host, port = parted(address)
    if not host or "/" in host:
        raise ConfigError(f"engine.cluster: {address!r} is not a host:port of Ray's head node, such as 10.0.0.7:6379")
    if not await listens(host, port):
        raise LaunchError(f"no Ray cluster answers at {address}; start it with: ray start --head --port={port}")


class RayLauncher:
    """Places on a Ray cluster. An engine's nodes are packed, and engines are spread. Open it with `open_ray`."""

    def __init__(self, process: asyncio.subprocess.Process, errors: BinaryIO) -> None:
        self._process, self._errors = process, errors
        self._address = "its cluster"
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._servers: dict[tuple[int, int], RayServer] = {}
        self._number = 0
        self._gone: str | None = None  # why the driver does not answer any more
        self._joined = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Wait until the driver has joined the cluster. Raises LaunchError."""
        self._reader = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(JOIN_DEADLINE):
                await self._joined.wait()
        except TimeoutError:
            raise LaunchError(
                f"Ray could not be joined or started within {JOIN_DEADLINE:.0f} s{self._last_words()}; if no cluster "
                "runs on this host, `ray stop` makes Ray forget the last one"
            ) from None
        if self._gone is not None:
            raise LaunchError(self._gone)

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence["RayPlace"]:
        """Get a placement group with an actor for each node. See `Launcher.reserve`."""
        placed = await self.call(
            "reserve",
            deadline + CALL_DEADLINE,
            name=name,
            gpus=need.gpus,
            cpus=need.cpus,
            nodes=nodes,
            need=str(need),
            deadline=deadline,
        )
        hosts = [one["host"] for one in placed["places"]]
        if all(is_here(f"http://{joined(host, 80)}") for host in hosts):
            hosts = ["127.0.0.1"] * nodes  # so that no other host reaches the servers
        return [
            RayPlace(self, placed["group"], index, host, one["gpus"] if need.gpus else None, one["python"])
            for index, (one, host) in enumerate(zip(placed["places"], hosts, strict=True))
        ]

    async def release(self, places: Sequence[Place]) -> None:
        """Give the placement group back. Its actors end, and with them what runs there."""
        for place in places:
            assert isinstance(place, RayPlace)
            if place.index == 0:
                try:
                    await self.call("release", CALL_DEADLINE, group=place.group)
                except LaunchError:
                    if self._gone is None:  # otherwise Ray has taken back what its driver had
                        raise
            if (server := self._servers.pop((place.group, place.index), None)) is not None:
                server.stands(False, f"{server.name} was ended", server.log_tail())

    async def call(self, call: str, within: float, **arguments: object) -> Any:
        """Return the driver's answer to a call. Raises LaunchError."""
        if self._gone is not None:
            raise LaunchError(self._gone)
        assert self._process.stdin is not None
        number = self._number = self._number + 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._process.stdin.write(json.dumps({"id": number, "call": call, **arguments}).encode() + b"\n")
            async with asyncio.timeout(within):
                return await answer
        except TimeoutError:
            raise LaunchError(f"Ray at {self._address} did not answer to {call} within {within:.0f} s") from None
        finally:
            self._calls.pop(number, None)

    def started(self, place: "RayPlace", name: str) -> "RayServer":
        """Return the server that was started at a place."""
        server = self._servers[place.group, place.index] = RayServer(name, self, place)
        return server

    async def close(self) -> None:
        """End the driver. Ray ends its actors, and the guards end what they had started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            match json.loads(line):
                case {"joined": str(address)}:
                    self._address = address
                    logger.info("engines run on the Ray cluster at %s", address)
                    self._joined.set()
                case {"note": str(note)}:
                    logger.warning("%s", note)
                case {"group": int(group), "index": int(index), "running": bool(running), "end": end, "tail": tail}:
                    if (server := self._servers.get((group, index))) is not None:
                        server.stands(running, end, tail)
                case {"id": int(number), **answer}:
                    self._answered(number, answer)
        self._gone = f"Ray at {self._address} is gone{self._last_words()}"
        self._joined.set()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(LaunchError(self._gone))
        for server in self._servers.values():
            server.stands(False, f"{server.name} ended: {self._gone}", server.log_tail())

    def _answered(self, number: int, answer: Mapping[Any, Any]) -> None:
        call = self._calls.get(number)
        if call is None or call.done():
            return  # its deadline has passed
        if "error" in answer:
            call.set_exception(LaunchError(answer["error"]))
        else:
            call.set_result(answer["result"])

    def _last_words(self) -> str:
        """Return the last line that the driver wrote about an error."""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {OF_A_LOG.sub('', lines[-1]).strip()[:300]}" if lines else ""


class RayPlace:
    """The place of one actor."""

    def __init__(self, launcher: RayLauncher, group: int, index: int, host: str, gpus: str | None, python: str) -> None:
        self.group, self.index = group, index
        self.host, self.gpus, self.python = host, gpus, python
        self._launcher = launcher

    async def free_ports(self, count: int) -> int:
        """Return the first of `count` consecutive ports that are free there."""
        at = {"group": self.group, "index": self.index}
        return int(await self._launcher.call("free_ports", CALL_DEADLINE, **at, host=self.host, count=count))

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> "RayServer":
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


class RayServer:
    """A server on the cluster, as its driver has last said that it stands."""

    def __init__(self, name: str, launcher: RayLauncher, place: RayPlace) -> None:
        self.name = name
        self._launcher, self._place = launcher, place
        self._ended = asyncio.Event()
        self._end = f"{name} runs"
        self._tail = f"nothing is known of its log on {place.host}"

    @property
    def running(self) -> bool:
        """Whether the server runs."""
        return not self._ended.is_set()

    async def wait(self) -> None:
        """Wait until the server has ended."""
        await self._ended.wait()

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

    def stands(self, running: bool, end: str, tail: str) -> None:
        """Note how the server stands."""
        self._end = end if running or not self.running else f"{end} (on {self._place.host})"
        self._tail = tail or self._tail
        if not running:
            self._ended.set()
