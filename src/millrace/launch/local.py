"""The launcher of this host: each server is a child process below a guard."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.launch.base import Need, Place
from millrace.launch.ports import free_block
from millrace.launch.process import ServerProcess


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """This host. The engine's settings say which of its GPUs an engine uses."""

    host: str = "127.0.0.1"
    gpus: str | None = None
    python: str = sys.executable

    async def free_ports(self, count: int) -> int:
        """Return the first of `count` consecutive free ports."""
        return free_block(self.host, count)

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> ServerProcess:
        """Start a command. See `ServerProcess.start`."""
        return await ServerProcess.start(name, command, log_path, env=env, leftovers=leftovers)


class LocalLauncher:
    """The launcher of this host. It counts no resources: the user says how many engines the host takes."""

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence[LocalPlace]:  # noqa: ARG002
        """Return this host for each node."""
        return [LocalPlace()] * nodes

    async def release(self, places: Sequence[Place]) -> None:
        """Do nothing: the processes of the places end by themselves."""


LOCAL = LocalLauncher()
