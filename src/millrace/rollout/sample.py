"""Problems, and the results of a rollout: groups of samples with their episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from millrace.rollout.timings import Timings
from millrace.types import ExpertArray, Float32Array, VersionSpan

# Of a chat: `role`, `content`, and what else the chat template reads. The content is a text, or a list of parts:
# `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, with the content of an image file in bytes.
Message = Mapping[str, object]


def text_of(content: object) -> str:
    """Return the text of a message's content. Its images are left out."""
    if not isinstance(content, list | tuple):
        return str(content)
    return "".join(part["text"] for part in content if part["type"] == "text")


def images_in(messages: Sequence[Message]) -> tuple[bytes, ...]:
    """Return the images of messages, in order."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return tuple(part["image"] for part in parts if part["type"] == "image")


def unmarked(messages: Sequence[Message]) -> list[Message]:
    """Return messages as the model reads them: those of tools without the mark of an error."""
    return [
        {key: value for key, value in message.items() if key != "error"} if message["role"] == "tool" else message
        for message in messages
    ]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data set.

    messages: the chat up to the model's first turn, system prompt included. row: the whole row, by column. answer: the
    text of the answer's column; None if the data have none.
    """

    problem_id: str
    messages: tuple[Message, ...] = field(hash=False)
    row: Mapping[str, object] = field(hash=False)
    answer: str | None = None

    @classmethod
    def of_question(cls, problem_id: str, question: str, answer: str) -> "Problem":
        """Return the problem of a row with the columns `question` and `answer`."""
        row = {"question": question, "answer": answer}
        return cls(problem_id, ({"role": "user", "content": question},), row, answer)

    @property
    def question(self) -> str:
        """The text of the last user message; empty if there is none."""
        asked = (text_of(message["content"]) for message in reversed(self.messages) if message["role"] == "user")
        return next(asked, "")


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
    ENVIRONMENT_DONE = "environment_done"


@dataclass(frozen=True, slots=True)
class Episode:
    """A whole conversation as token ids: the prompt, the model's turns and the tool answers, never re-tokenized.

    token_ids: [T]. loss_mask: [T] bool, True for tokens that the model generated. logprobs: [T] float32, the engine's
    at the time of sampling; 0 where loss_mask is False. version_spans: which weight versions generated which positions;
    they cover exactly the positions where loss_mask is True. turns: of the model. messages: the conversation after the
    prompt, as chat messages; a turn of the model has `content`, `reasoning` and, if there are any, `tool_calls`; the
    answer of a tool that failed has `error`, which is True. images: the contents of the image files in the
    conversation, in order; `token_ids` has for each the run of placeholders that the engine read. routed_experts: [N,
    L, K] uint8 or uint16, of the first N tokens, as in `Generation`; None if the engine does not return them.
    """

    token_ids: tuple[int, ...]
    loss_mask: NDArray[np.bool_]
    logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    turns: int
    end: EpisodeEnd
    messages: tuple[Message, ...] = ()
    images: tuple[bytes, ...] = field(default=(), repr=False)
    routed_experts: ExpertArray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt at a problem.

    episode: None unless the status is FINISHED. reward: 0 without an episode. reason: why there is no episode. rewards:
    the parts of the reward before they are weighted, by the names of their functions. branches: of an agent's sample,
    the token sequences besides the episode, in which each generated token is trained once. counts: of an agent's
    sample, what happened to its requests, by name. prompt: the messages before the episode's, if they are not the
    problem's. timings: when it ran, and where its time went.
    """

    sample_id: str
    group_id: str
    problem: Problem
    status: SampleStatus
    episode: Episode | None
    reward: float
    reason: str | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    branches: tuple[Episode, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    prompt: tuple[Message, ...] | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The chat messages of prompt and episode. Without an episode, those of the prompt."""
        prompt = self.problem.messages if self.prompt is None else self.prompt
        return prompt if self.episode is None else (*prompt, *self.episode.messages)

    @property
    def sequences(self) -> tuple[Episode, ...]:
        """All token sequences to train on; each has the sample's advantage. Empty without an episode."""
        return (*self.branches, self.episode) if self.episode is not None else ()

    @property
    def generated_tokens(self) -> int:
        """The number of tokens that the model generated, in all sequences."""
        return sum(int(one.loss_mask.sum()) for one in self.sequences)

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version of its tokens; None if no published version generated any."""
        return min(self._versions, default=None)

    @property
    def newest_version(self) -> int | None:
        """The newest weight version of its tokens; None if no published version generated any."""
        return max(self._versions, default=None)

    @property
    def _versions(self) -> list[int]:
        return [s.version for one in self.sequences for s in one.version_spans if s.version is not None]


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one problem, all of which have ended."""

    group_id: str
    problem: Problem
    samples: tuple[Sample, ...]
