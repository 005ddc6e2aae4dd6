"""What plays one sample: the sample, the agent, and how it ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from millrace.gateway.gateway import OpenEpisode
from millrace.rollout.sample import Problem


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
