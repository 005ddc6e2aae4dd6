"""Conversations of a model with its tools, after prompts of TRL's data sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from millrace.errors import ArgumentError, DataError
from millrace.fleet.client import FleetClient
from millrace.integrations.trl.requests import Sender, sampling_params
from millrace.rollout.agent import EpisodeLimits, run_episode
from millrace.rollout.calls import Calls
from millrace.rollout.chat import ChatFormat, check_chat_format, check_prompt_format
from millrace.rollout.sample import Episode, Message
from millrace.rollout.toolbox import MakeTool, name_in, opened, tool_kind
from millrace.rollout.tools import Tool
from millrace.types import GenerateRequest, Generation, RoutingContext

ToolCode = type[Tool] | Callable[..., object]  # a subclass of Tool, or a function


@dataclass(frozen=True, slots=True)
class PlayedConversation:
    """A conversation that was played. prompt_tokens: the length of its prompt."""

    prompt_tokens: int
    episode: Episode

    @property
    def messages(self) -> list[Message]:
        """The chat messages after the prompt."""
        return list(self.episode.messages)


@dataclass(frozen=True, slots=True)
class Conversations:
    """Plays conversations of one model.

    tools: by name. max_turns: of the model. max_turn_tokens: output tokens of one turn; None for as many as the
    completion may have.
    """

    chat: ChatFormat
    tools: Mapping[str, MakeTool]
    max_turns: int
    max_turn_tokens: int | None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[ToolCode],
        max_turns: int,
        max_turn_tokens: int | None,
        tool_timeout: float | None,
    ) -> "Conversations":
        """Return conversations in the tokenizer's chat template.

        Raises DataError if turns can't be appended in the template, ConfigError if a tool can't be used, and
        ArgumentError if `tokenizer` is not one.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ArgumentError(f"tokenizer must be a tokenizer of transformers, and is a {type(tokenizer).__name__}")
        calls = Calls()
        kinds = [tool_kind(tool, f"tools: {_name(tool)}", tool_timeout, calls) for tool in tools]
        name, schemas = tokenizer.name_or_path or "the tokenizer", [kind.schema for kind in kinds]
        chat = check_chat_format(tokenizer, name, schemas) if kinds else check_prompt_format(tokenizer, name)
        return cls(chat, {name_in(kind.schema): kind.make for kind in kinds}, max_turns, max_turn_tokens)

    def prompt(self, messages: object) -> tuple[int, ...]:
        """Return a prompt as token ids. Raises DataError if it is not a list of chat messages."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise DataError(f"prompts must be lists of chat messages, and one is a {type(messages).__name__}")
        return self.chat.prompt_of(messages)

    async def play(
        self,
        fleet: FleetClient,
        sender: Sender,
        name: str,
        messages: object,
        routing: RoutingContext,
        source: Any,
        on_progress: Callable[[], None] = lambda: None,
    ) -> PlayedConversation:
        """Play one conversation after a prompt of chat messages.

        name: unique among the conversations in flight. source: the trainer or its config, for the sampling and
        `max_completion_length`, which limits all that follows the prompt. on_progress: called after each turn and each
        tool call.
        """
        prompt, wanted = self.prompt(messages), source.max_completion_length
        most = len(prompt) + wanted
        limits = EpisodeLimits(self.max_turns, self.max_turn_tokens or wanted, most, fleet.context_length)

        async def generate(request: GenerateRequest) -> Generation:
            made = await sender.send(fleet, request, routing)
            on_progress()
            return made

        async with opened(self.tools) as tools:
            episode = await run_episode(
                name,
                prompt,
                generate=generate,
                chat=self.chat,
                tools=tools,
                limits=limits,
                sampling=sampling_params(source, wanted, ()),
                on_tool_answer=lambda _: on_progress(),
            )
        return PlayedConversation(len(prompt), episode)


def _name(tool: object) -> str:
    return str(getattr(tool, "__name__", tool))
