"""Conversations as token ids. No token is encoded twice: later turns are only appended.

The chat template renders the prompt once. The model's own tokens stay as they were sampled. The tokens between two of
its turns (the tool answers and the next generation prompt) are rendered after a stand-in turn, which is then cut off.
The cut is at the end-of-turn token, which no tokenizer merges with its neighbours, so the appended tokens are those
that the template gives. Every rendering uses the same template, tools and keyword arguments.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from millrace.errors import DataError
from millrace.placeholders import collapsed
from millrace.rollout.chat_template import ChatTemplate, StandInTurn, first_line, stand_in_turn, turn_before_user
from millrace.rollout.control_tokens import break_control_tokens, control_tokens, encode, encode_pieces, unused_mark
from millrace.rollout.reasoning import QUESTION, Reasoning, find_reasoning
from millrace.rollout.sample import Message, images_in
from millrace.rollout.vision import Vision, load_vision

log = logging.getLogger("millrace.rollout")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How one model writes conversations, with the tools that its prompts describe.

    end_of_turn: the id of the token that ends each turn of the model. reasoning: how to separate reasoning and answer.
    control: the texts of the control tokens; in questions and tool answers they stay ordinary text.
    turn_before_answers: what tool answers can be appended to; None for a model without tools. turn_before_user: what a
    user's messages can be appended to; None if the conversation has no second user message. vision: how the model reads
    images, or the reason why it reads none.
    """

    template: ChatTemplate
    end_of_turn: int
    reasoning: Reasoning
    control: tuple[str, ...]
    turn_before_answers: StandInTurn | None = None
    turn_before_user: StandInTurn | None = None
    vision: Vision | str = "its folder was not looked at"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.template.tokenizer

    def prompt(self, question: str, system_prompt: str | None = None) -> tuple[int, ...]:
        """Return the token ids of a question, up to the start of the model's first turn. As `prompt_of`."""
        asked: list[Message] = [{"role": "user", "content": question}]
        return self.prompt_of([{"role": "system", "content": system_prompt}, *asked] if system_prompt else asked)

    def prompt_of(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of a conversation, up to the start of the model's first turn, with one placeholder for
        each image.

        Raises DataError if the template refuses the messages, or the model reads no images and they have some.
        """
        texts, mark = self.as_text(messages)
        return self.with_places(self.encode(self.template.render(texts), mark), messages)

    def added(self, images: Sequence[bytes]) -> int:
        """Return how many tokens a prompt gains when the placeholder of each image becomes a run of them.

        Raises DataError if the model reads no images and there are some.
        """
        return self._sight().added(images) if images else 0

    def continuation(self, tool_answers: Sequence[str], *, turn_ended: bool = True) -> tuple[int, ...]:
        """Return the token ids between a turn of the model and its next one, with tool answers as in `reply`."""
        return self.reply([{"role": "tool", "content": text} for text in tool_answers], turn_ended=turn_ended)

    def reply(self, messages: Sequence[Message], *, turn_ended: bool = True) -> tuple[int, ...]:
        """Return the token ids between a turn of the model and its next one, with these messages.

        messages: of a user, of tools, or of tools and then of a user. turn_ended: whether the turn has its end-of-turn
        token already; if not, the result starts with it. Raises DataError if the template refuses the messages.
        """
        by_tools = any(message["role"] == "tool" for message in messages)
        turn = self.turn_before_answers if by_tools else self.turn_before_user
        if turn is None:
            raise DataError(f"this chat format has no form for {'tool' if by_tools else 'user'} messages after a turn")
        texts, mark = self.as_text(messages)
        ids = self.with_places(self.encode(turn.around(texts)[1], mark), messages)
        return ids[1:] if turn_ended else ids

    def turn(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a whole turn of the model, end-of-turn token included, for supervised training."""
        return (*encode(self.tokenizer, text), self.end_of_turn)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def answer(self, turn: Sequence[int]) -> str:
        """Return the text of a whole turn of the model, without its reasoning and its end-of-turn token.

        Empty if the reasoning has no end.
        """
        return self.split(turn)[1]

    def split(self, turn: Sequence[int]) -> tuple[str, str]:
        """Return the reasoning of a whole turn of the model, and the rest of its text as `answer` does."""
        return self.reasoning.split(self.decode(turn[:-1] if tuple(turn[-1:]) == (self.end_of_turn,) else turn))

    def folded(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return token ids with one placeholder in place of the run that an engine made of it."""
        return token_ids if isinstance(self.vision, str) else collapsed(token_ids, self.vision.placeholder)

    def has_placeholder(self, token_ids: Sequence[int]) -> bool:
        """Return whether a token stands for an image."""
        return not isinstance(self.vision, str) and self.vision.placeholder in token_ids

    def _sight(self) -> Vision:
        if isinstance(self.vision, str):
            raise DataError(f"the model reads no images: {self.vision}")
        return self.vision

    def with_places(self, token_ids: tuple[int, ...], messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of messages. Raises DataError unless they have a placeholder for each image."""
        images = len(images_in(messages))
        if images and (places := token_ids.count(self._sight().placeholder)) != images:
            raise DataError(f"the chat template writes {places} placeholders for {images} images")
        return token_ids

    def as_text(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Return the messages with a mark inserted into each control token of their texts, and the mark.

        Raises DataError if they have images and the model reads none.
        """
        if images_in(messages):
            self._sight()
        mark = unused_mark(text for message in messages for text in _texts(message))
        return [self._broken(message, mark) for message in messages], mark

    def _broken(self, value: Any, mark: str) -> Any:
        match value:
            case str():
                return break_control_tokens(value, self.control, mark)
            case Mapping():
                return {key: one if key == "role" else self._broken(one, mark) for key, one in value.items()}
            case list() | tuple():
                return [self._broken(one, mark) for one in value]
        return value

    def encode(self, text: str, mark: str) -> tuple[int, ...]:
        """Return the token ids of a text that was rendered from messages with this mark (`as_text`)."""
        return encode_pieces(self.tokenizer, text, mark, anchor=self.end_of_turn)


def load_chat_format(
    path: str | Path,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Load tokenizer and chat template of a model folder or Hub name, and check that turns can be appended.

    tools: the JSON schemas that the prompts describe. template_kwargs: keyword arguments of the template.

    Raises DataError if tokenizer or template is missing, or if the template lacks a variable of `template_kwargs`,
    can't write tool answers, rewrites earlier turns, does not end turns with a special token, or, with tools, writes
    calls in a form that `parse_tool_calls` does not read.
    """
    path = str(path)
    return _seeing(check_chat_format(load_tokenizer(path), path, tools, template_kwargs), path)


def load_prompt_format(path: str | Path, template_kwargs: Mapping[str, object] | None = None) -> ChatFormat:
    """Load tokenizer and chat template for conversations of one turn without tools.

    Raises DataError if tokenizer or template is missing, or no token ends a turn.
    """
    path = str(path)
    return _seeing(check_prompt_format(load_tokenizer(path), path, template_kwargs), path)


def load_dialogue_format(
    path: str,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Load tokenizer and chat template for conversations in which a user answers the model's turns.

    tools, template_kwargs: as for `load_chat_format`. Without tools, the template needs no form for their answers.

    Raises DataError as `load_chat_format` does, and if a user's message can't be appended.
    """
    return _seeing(check_dialogue_format(load_tokenizer(path), path, tools, template_kwargs), path)


def check_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Return the chat format of a tokenizer, after checking its template as `load_chat_format` does.

    Raises DataError, whose message starts with `name`.
    """
    template = ChatTemplate(tokenizer, tuple(tools), template_kwargs or {})
    try:
        check_kwargs(template)
        turn = stand_in_turn(template)
        reasoning, control = find_markers(template)
        if tools:
            _check_calls(turn, reasoning, name)
        turn.check_answers(reasoning)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return ChatFormat(template, turn.token(), reasoning, control, turn)


def check_dialogue_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Return the chat format for conversations with several user messages, as `load_dialogue_format` does.

    Raises DataError, whose message starts with `name`.
    """
    template = ChatTemplate(tokenizer, tuple(tools), template_kwargs or {})
    with_tools = check_chat_format(tokenizer, name, tools, template_kwargs).turn_before_answers if tools else None
    try:
        check_kwargs(template)
        turn = turn_before_user(template)
        reasoning, control = find_markers(template)
        turn.check_user(reasoning)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return ChatFormat(template, turn.token(), reasoning, control, with_tools, turn)


def check_prompt_format(
    tokenizer: PreTrainedTokenizerBase, name: str, template_kwargs: Mapping[str, object] | None = None
) -> ChatFormat:
    """Return the chat format for conversations of one turn, as `load_prompt_format` does.

    Raises DataError, whose message starts with `name`.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token, which must end each turn")
    template = ChatTemplate(tokenizer, (), template_kwargs or {})
    try:
        check_kwargs(template)
        return ChatFormat(template, tokenizer.eos_token_id, *find_markers(template))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def check_kwargs(template: ChatTemplate) -> None:
    """Raise DataError if the template does not use one of its keyword arguments."""
    parameters = inspect.signature(template.tokenizer.apply_chat_template).parameters
    for argument in template.kwargs:
        if argument in parameters:
            raise DataError(f"{argument} is an argument of apply_chat_template, not a variable of the chat template")
        if not re.search(rf"\b{re.escape(argument)}\b", template.source):
            raise DataError(f"the chat template has no variable {argument} (rollout.chat_template_kwargs)")


def find_markers(template: ChatTemplate) -> tuple[Reasoning, tuple[str, ...]]:
    """Return the reasoning markers and the control tokens.

    Raises DataError if the template does not write the text of a user's message.
    """
    source, tokenizer = template.source, template.tokenizer
    if QUESTION not in template.render([{"role": "user", "content": QUESTION}]):
        raise DataError("the chat template does not write a user's text; Millrace sends it as a string, not as parts")
    reasoning = find_reasoning(template.render, source, tokenizer.get_added_vocab().keys())
    return reasoning, control_tokens(tokenizer, f"{source}\n{reasoning.opening}\n{reasoning.closing}")


def _check_calls(turn: StandInTurn, reasoning: Reasoning, name: str) -> None:
    if turn.arguments is None:
        log.warning(
            "%s: the chat template writes no tool calls, so the model may not know how to call a tool. Calls are read "
            'from its turns if they have the form <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
            name,
        )
    if (unread := turn.unread_call(reasoning)) is not None:
        raise DataError(
            "the chat template writes tool calls in a form that Millrace does not read; it reads "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call> and <tool_call><function=...>. Use a model that '
            f"writes one of these, or leave rollout.tools empty. The template writes: {unread!r}"
        )


def _seeing(chat: ChatFormat, path: str) -> ChatFormat:
    return replace(chat, vision=load_vision(path))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or Hub name. Raises DataError if it has none, or no chat template."""
    if _means_a_folder(path) and not Path(path).is_dir():
        raise DataError(f"{path}: there is no such model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(f"{path}: no tokenizer could be loaded from it ({first_line(error)})") from error
    if not encode(tokenizer, "question"):  # transformers creates an empty tokenizer if it finds only a config.json
        raise DataError(f"{path}: it has no tokenizer; put the model's tokenizer.json into the folder")
    if tokenizer.chat_template is None:
        raise DataError(f"{path}: the tokenizer has no chat template; put a chat_template.jinja into the folder")
    return tokenizer


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a message."""
    match value:
        case str():
            yield value
        case Mapping():
            yield from (text for one in value.values() for text in _texts(one))
        case list() | tuple():
            yield from (text for one in value for text in _texts(one))


def _means_a_folder(path: str) -> bool:
    """Return whether the path can't be a Hub name (`name` or `owner/name`), so that the Hub is not asked for it."""
    return path.startswith((".", "~", "/")) or path.count("/") > 1
