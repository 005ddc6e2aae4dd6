"""A conversation in token ids. Nothing in it is encoded twice; later turns only append (invariant 4).

The chat template renders the prompt once. After that the model's own tokens stand as they were sampled. What lies
between two of its turns (the tools' answers and the next generation prompt) is rendered behind a stand-in turn and cut
off there. The cut is at the end-of-turn token, which no tokenizer merges with its neighbours, so the appended tokens
are those that the template would give. Every rendering has the same template, tools and keyword arguments.
"""

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from millrace.errors import DataError
from millrace.rollout.chat_template import ChatTemplate, StandInTurn, first_line, stand_in_turn
from millrace.rollout.control_tokens import break_control_tokens, control_tokens, encode, encode_pieces, unused_mark
from millrace.rollout.reasoning import QUESTION, Reasoning, find_reasoning

log = logging.getLogger("millrace.rollout")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """One model's way to write a conversation, with the tools that its prompts describe.

    end_of_turn: the token that ends each of the model's turns. control: the texts of the control tokens, which a
    question or a tool's answer can only spell. turn_before_answers: None for a model without tools.
    """

    template: ChatTemplate
    end_of_turn: int
    reasoning: Reasoning
    control: tuple[str, ...]
    turn_before_answers: StandInTurn | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    def prompt(self, question: str, system_prompt: str | None = None) -> tuple[int, ...]:
        """The token ids up to where the model's first turn begins. Raises DataError where the template refuses it."""
        texts = [system_prompt, question] if system_prompt else [question]
        texts, mark = self._as_text(texts)
        roles = ("system", "user")[-len(texts) :]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return self._encode(self.template.render(messages), mark)

    def continuation(self, tool_answers: Sequence[str], *, turn_ended: bool = True) -> tuple[int, ...]:
        """The token ids from behind the model's turn to where its next one begins. With `turn_ended` False the
        end-of-turn token comes first: the model stopped without it."""
        assert self.turn_before_answers is not None, "a format without tools has no tool answers"
        texts, mark = self._as_text(tool_answers)
        ids = self._encode(self.turn_before_answers.around(texts)[1], mark)
        return ids[1:] if turn_ended else ids

    def turn(self, text: str) -> tuple[int, ...]:
        """A whole turn of the model as its tokens, the end-of-turn token included: what supervised steps teach."""
        return (*encode(self.tokenizer, text), self.end_of_turn)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def answer(self, turn: Sequence[int]) -> str:
        """The text of a whole turn of the model, without its reasoning and the token that ends it. Empty where the
        reasoning has no end."""
        return self.reasoning.answer(self.decode(turn[:-1] if turn[-1:] == (self.end_of_turn,) else turn))

    def _as_text(self, texts: Sequence[str]) -> tuple[list[str], str]:
        """The texts, with a mark in each control token that they spell, and that mark."""
        mark = unused_mark(texts)
        return [break_control_tokens(text, self.control, mark) for text in texts], mark

    def _encode(self, text: str, mark: str) -> tuple[int, ...]:
        return encode_pieces(self.tokenizer, text, mark, anchor=self.end_of_turn)


def load_chat_format(
    path: str,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Reads the tokenizer and the chat template of a model folder (or Hub name) and checks that turns can be appended.

    tools: the JSON schemas that the prompts describe. template_kwargs: keyword arguments of the template.
    Raises DataError where tokenizer or template is missing, and where the template has no variable of that name, has
    no form for a tool's answer, rewrites earlier turns, ends a turn with no special token, or, with tools, writes calls
    in a form that `parse_tool_calls` does not read.
    """
    return check_chat_format(_load_tokenizer(path), path, tools, template_kwargs)


def load_prompt_format(path: str, template_kwargs: Mapping[str, object] | None = None) -> ChatFormat:
    """The same for a model that makes one turn and is told nothing of tools: its template needs no form for them.

    Raises DataError where tokenizer or template is missing, or no token ends a turn.
    """
    return check_prompt_format(_load_tokenizer(path), path, template_kwargs)


def check_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tools: Sequence[Mapping[str, object]] = (),
    template_kwargs: Mapping[str, object] | None = None,
) -> ChatFormat:
    """Wraps a tokenizer after checking its template. Raises DataError, whose message starts with `name`."""
    template = ChatTemplate(tokenizer, tuple(tools), template_kwargs or {})
    try:
        _check_kwargs(template)
        turn = stand_in_turn(template)
        reasoning, control = _reading(template)
        if tools:
            _check_calls(turn, reasoning, name)
        turn.check(reasoning)
        before, after = turn.around(["17"])
        after_ids = encode(tokenizer, after)
        if encode(tokenizer, before + after) != encode(tokenizer, before) + after_ids:
            raise DataError("the tokens of a turn change with what follows it; its turns can't be appended to")
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return ChatFormat(template, after_ids[0], reasoning, control, turn)


def check_prompt_format(
    tokenizer: PreTrainedTokenizerBase, name: str, template_kwargs: Mapping[str, object] | None = None
) -> ChatFormat:
    """The same for a model that makes one turn."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(f"{name}: the tokenizer names no end-of-sequence token, which ends a turn")
    template = ChatTemplate(tokenizer, (), template_kwargs or {})
    try:
        _check_kwargs(template)
        return ChatFormat(template, tokenizer.eos_token_id, *_reading(template))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _check_kwargs(template: ChatTemplate) -> None:
    """Raises DataError for a keyword argument that the template does not take."""
    taken = inspect.signature(template.tokenizer.apply_chat_template).parameters
    for argument in template.kwargs:
        if argument in taken:
            raise DataError(f"{argument} is an argument of apply_chat_template, and no variable of the chat template")
        if not re.search(rf"\b{re.escape(argument)}\b", template.source):
            raise DataError(f"the chat template has no variable {argument} (rollout.chat_template_kwargs)")


def _reading(template: ChatTemplate) -> tuple[Reasoning, tuple[str, ...]]:
    """How the model's turns are read, and its control tokens. Raises DataError where the template does not write a
    user's text."""
    source, tokenizer = template.source, template.tokenizer
    if QUESTION not in template.render([{"role": "user", "content": QUESTION}]):
        raise DataError("the chat template does not write a user's text; Millrace sends it as a string, not as parts")
    reasoning = find_reasoning(template.render, source, tokenizer.get_added_vocab().keys())
    return reasoning, control_tokens(tokenizer, f"{source}\n{reasoning.opening}\n{reasoning.closing}")


def _check_calls(turn: StandInTurn, reasoning: Reasoning, name: str) -> None:
    if turn.arguments is None:
        log.warning(
            "%s: the chat template writes no tool calls, so the model may not know how to call a tool. Calls are read "
            'from its turns where they are written as <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
            name,
        )
    if (unread := turn.unread_call(reasoning)) is not None:
        raise DataError(
            "the chat template writes tool calls in a form that Millrace does not read; it reads "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call> and <tool_call><function=...>. Take a model that '
            f"writes one of these, or leave rollout.tools empty. The template writes: {unread!r}"
        )


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if _means_a_folder(path) and not Path(path).is_dir():
        raise DataError(f"{path}: there is no such model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(f"{path}: no tokenizer could be loaded from it ({first_line(error)})") from error
    if not encode(tokenizer, "question"):  # transformers makes an empty tokenizer where only a config.json is found
        raise DataError(f"{path}: it has no tokenizer; put the model's tokenizer.json into the folder")
    if tokenizer.chat_template is None:
        raise DataError(f"{path}: the tokenizer has no chat template; put a chat_template.jinja into the folder")
    return tokenizer


def _means_a_folder(path: str) -> bool:
    """Whether it can't be a name on the Hub, which is `name` or `owner/name`; so that no one asks the Hub for it."""
    return path.startswith((".", "~", "/")) or path.count("/") > 1
