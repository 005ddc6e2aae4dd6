"""The ports of agents: what plays one sample, and what runs a command."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from millrace.gateway.gateway import OpenEpisode
from millrace.rollout.sample import Problem


@dataclass(frozen=True, slots=True)
class AgentCommand:
    """A command that plays one sample.

    name: of the sample. folder: its working folder, with its files. environment: all of its variables. log: the file
    for its output. memory: bytes that each process may allocate, and processes: how many it may have; None is no limit.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    memory: int | None = None
    processes: int | None = None


class AgentRunner(Protocol):
    """Runs commands. `LocalRunner` runs them as processes; write another one for containers, and name it in
    `agent.runner`."""

    async def run(self, command: AgentCommand) -> int:
        """Run a command to its end, and return its exit status: 128 plus the number if a signal ended it.

        When this returns, or is cancelled, nothing that the command has started runs any more. Raises LaunchError if
        the command can't be started.
        """
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A sample for an agent to play: its problem, and the open episode through which it talks to the model."""

    sample_id: str
    problem: Problem
    episode: OpenEpisode


@dataclass(frozen=True, slots=True)
class Ended:
    """How an agent ended. failure: None if it did not fail. reward: None if it gave none. parts: of the reward."""

    failure: str | None = None
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class Agent(Protocol):
    """What plays samples: the user's command or function.

    where: its name in messages.
    """

    @property
    def where(self) -> str: ...

    async def run(self, job: Job) -> Ended:
        """Play a sample. Cancelling it ends the agent."""
        ...

    def result(self, job: Job, ended: Ended) -> Ended:
        """Return the end of an agent with its reward, if it gave one. Raises UserCodeError if that can't be read."""
        ...

    async def clean(self, job: Job, *, failed: bool) -> None:
        """Remove what the agent left. failed: whether its sample failed."""
        ...
