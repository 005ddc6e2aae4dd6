"""The port to what starts engines: this host, or a cluster. A launcher gives places, and a place starts processes.

places = await launcher.reserve("sglang-0", Need(gpus=2, cpus=1), 1, deadline=600.0)
try:
    port = await places[0].free_ports(1)
    server = await places[0].start("sglang-0", command, log_path, env={}, leftovers=())
    ...
    await server.end()
finally:
    await launcher.release(places)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from millrace.launch.process import Server


@dataclass(frozen=True, slots=True)
class Need:
    """What one node of an engine takes of its host: a number of GPUs and of CPUs."""

    gpus: int
    cpus: int

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'' if self.gpus == 1 else 's'} and {self.cpus} CPU{'' if self.cpus == 1 else 's'}"


class Place(Protocol):
    """Where one node of an engine runs."""

    @property
    def host(self) -> str:
        """The address that a server listens on there. This process and the engine's other nodes reach it."""

    @property
    def gpus(self) -> str | None:
        """CUDA_VISIBLE_DEVICES of the processes there: the assigned GPUs. None leaves the variable as it is there."""

    @property
    def python(self) -> str:
        """A Python interpreter there that has Millrace."""

    async def free_ports(self, count: int) -> int:
        """Return the first of `count` consecutive ports that are free there."""

    async def start(
        self, name: str, command: Sequence[str], log_path: Path, *, env: Mapping[str, str], leftovers: Sequence[str]
    ) -> Server:
        """Start `command` there, with `env` added to the environment that processes have there.

        Its output goes to `log_path` there. When the server ends, when its owner calls `end`, and when the owner dies,
        its whole process tree ends. leftovers: as for `ServerProcess.start`.

        Raises LaunchError if the command can't be started.
        """


class Launcher(Protocol):
    """What starts engines."""

    async def reserve(self, name: str, need: Need, nodes: int, *, deadline: float) -> Sequence[Place]:
        """Return a place for each node of the engine `name`: near each other, and away from those of other engines.

        Raises LaunchError, with what was asked for and what there is, if there is none within `deadline` seconds.
        """

    async def release(self, places: Sequence[Place]) -> None:
        """Give the places of an engine back. What runs there ends. Does nothing for places that are given back."""
