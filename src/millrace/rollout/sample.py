"""The results of a rollout: groups of samples with their episodes."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from millrace.types import Float32Array, VersionSpan


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a data set. `answer` is the number after GSM8K's `####`, without thousands separators."""

    problem_id: str
    question: str
    answer: str


class SampleStatus(StrEnum):
    """How a sample ended. Every sample ends exactly once."""

    FINISHED = "finished"
    ABORTED = "aborted"  # cancelled: it was too stale, or the run ends
    FAILED = "failed"


class EpisodeEnd(StrEnum):
    """Why the conversation of a finished sample ended."""

    ANSWERED = "answered"  # a turn without a tool call
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"  # noqa: S105
    CONTEXT_FULL = "context_full"


@dataclass(frozen=True, slots=True)
class Episode:
    """A whole conversation as token ids: the prompt, the model's turns and the tool answers, never re-tokenized.

    token_ids: [T]. loss_mask: [T] bool, True for tokens that the model generated. logprobs: [T] float32, the engine's
    at the time of sampling; 0 where loss_mask is False. version_spans: which weight versions generated which positions;
    they cover exactly the positions where loss_mask is True. turns: of the model.
    """

    token_ids: tuple[int, ...]
    loss_mask: NDArray[np.bool_]
    logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    turns: int
    end: EpisodeEnd


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt at a problem.

    episode: None unless the status is FINISHED. reward: 0 without an episode. reason: why there is no episode.
    """

    sample_id: str
    group_id: str
    problem: Problem
    status: SampleStatus
    episode: Episode | None
    reward: float
    reason: str | None = None

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version of its tokens; None if no published version generated any."""
        versions = [s.version for s in self.episode.version_spans if s.version is not None] if self.episode else []
        return min(versions, default=None)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one problem, all of which have ended."""

    group_id: str
    problem: Problem
    samples: tuple[Sample, ...]
