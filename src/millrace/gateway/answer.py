"""The answer to a request, in one form for all protocols."""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from millrace.gateway.call import ToolUse, TurnText
from millrace.types import Float32Array


class Finish(StrEnum):
    """Why a turn of the model ended."""

    STOP = "stop"  # the model ended it
    STOP_TEXT = "stop_text"  # a stop text of the request
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. prompt: of the whole prompt; cached: those of it in the engine's prefix cache; output: sampled;
    reasoning: those of the output in the reasoning."""

    prompt: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Alternative:
    """One sample of the answer. stop_text: the stop text that ended it. token_texts: [T], one for each logprob."""

    turn: TurnText
    finish: Finish
    stop_text: str | None = None
    output_ids: tuple[int, ...] = ()
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))
    token_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer to a request: `n` alternatives. id: unique. created: Unix time in seconds."""

    id: str
    model: str
    created: int
    alternatives: tuple[Alternative, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream adds to one alternative: reasoning, content, or a tool call that is complete.

    index: of the alternative. call_index: of the call among the alternative's.
    """

    index: int
    reasoning: str = ""
    content: str = ""
    call: ToolUse | None = None
    call_index: int = 0
