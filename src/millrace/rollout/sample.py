"""What a rollout yields: samples, whole and each with its own end."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from millrace.types import Float32Array, VersionSpan


@dataclass(frozen=True, slots=True)
class Problem:
    """One task of a data set. `answer` is the number behind GSM8K's `####`, without thousands separators."""

    problem_id: str
    question: str
    answer: str


class SampleStatus(StrEnum):
    """A sample ends in exactly one of these, once."""

    FINISHED = "finished"
    ABORTED = "aborted"  # given up on purpose: too stale, or the run ends
    FAILED = "failed"


class EpisodeEnd(StrEnum):
    """Why the conversation of a finished sample ended."""

    ANSWERED = "answered"  # a turn without a tool call
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"  # noqa: S105
    CONTEXT_FULL = "context_full"


@dataclass(frozen=True, slots=True)
class Episode:
    """A whole conversation in token ids: prompt, the model's turns and the tools' answers, in order, never
    re-tokenized.

    token_ids: [T]. loss_mask: [T] bool, True where the model made the token. logprobs: [T] float32, the engine's at the
    time of sampling, 0 where loss_mask is False. version_spans: positions in token_ids; they cover exactly
    the True places.
    """

    token_ids: tuple[int, ...]
    loss_mask: NDArray[np.bool_]
    logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    turns: int
    end: EpisodeEnd


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt at one problem. A sample that is not FINISHED has no episode and a `reason`."""

    sample_id: str
    group_id: str
    problem: Problem
    status: SampleStatus
    episode: Episode | None
    reward: float
    reason: str | None = None

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version in it; None where it has no tokens of a published version."""
        versions = [s.version for s in self.episode.version_spans if s.version is not None] if self.episode else []
        return min(versions, default=None)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one problem, complete: each has ended in one way."""

    group_id: str
    problem: Problem
    samples: tuple[Sample, ...]
