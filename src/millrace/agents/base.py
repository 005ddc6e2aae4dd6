"""The port to what runs the commands of agents."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AgentCommand:
    """A command that plays one sample.

    name: of the sample. folder: its working folder, with its files. environment: all of its variables. log: the file
    for its output. memory: bytes that each process may allocate, and processes: how many it may have; None is no limit.
    grace: seconds between SIGTERM, with which it is ended early, and SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    memory: int | None = None
    processes: int | None = None
    grace: float = 2.0


class AgentRunner(Protocol):
    """Runs commands. `LocalRunner` runs them as processes; write another one for containers, and name it in
    `agent.runner`."""

    async def run(self, command: AgentCommand) -> int:
        """Run a command to its end, and return its exit status: 128 plus the number if a signal ended it.

        When this returns, or is cancelled, nothing that the command has started runs any more. Raises LaunchError if
        the command can't be started.
        """
        ...
