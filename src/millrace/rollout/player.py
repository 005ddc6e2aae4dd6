"""The port to a player of whole samples: an agent that talks to the gateway, in place of `converse`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.sample import Episode, Problem
from millrace.types import SamplingParams


@dataclass(frozen=True, slots=True)
class PlayedByAgent:
    """What came of a sample.

    episode: with the last answer; its messages have the whole conversation, prompt included. branches: the other token
    sequences. reward: None leaves it to the reward functions. parts: of the reward, by name. counts: for the records.
    seconds: where its time went, by the names of `Timings`.
    """

    episode: Episode
    branches: tuple[Episode, ...] = ()
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class Player(Protocol):
    """Plays samples with a model."""

    async def play(
        self, sample_id: str, problem: Problem, *, sampling: SamplingParams, limits: EpisodeLimits, timeout: float
    ) -> PlayedByAgent:
        """Play a sample to its end. Cancelling it ends what it has started.

        timeout: seconds, without those in which the fleet is interrupted. Raises TimeoutError; UserCodeError if the
        agent gave nothing to train on, or no reward; and the errors of engines.
        """
        ...
