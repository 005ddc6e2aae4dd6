"""What a model and an environment say to each other: actions and steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace.rollout.sample import Message
from millrace.rollout.tools import ToolCall


@dataclass(frozen=True, slots=True)
class Action:
    """A turn of the model, as an environment sees it.

    text: the turn without its reasoning, tool calls included. tool_calls: the calls that could be parsed, if the
    environment has tools. errors: what is wrong with each of the others. cut: whether a limit on tokens cut it off.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    errors: tuple[str, ...] = ()
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment makes of an action.

    observation: a text, which becomes a user's message, or a list of messages of tools and a user, whose contents may
    have images as parts `{"type": "image", "image": ...}`. It is not used if `done` ends the episode. reward: of this
    action; those of an episode are added up. parts: what the rewards are made of, by name, for the records; those of an
    episode are added up, too.
    """

    observation: str | Sequence[Message] = ""
    reward: float = 0.0
    done: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
