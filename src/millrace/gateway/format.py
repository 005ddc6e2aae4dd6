"""How a model's conversations become token ids, and its turns become text: the port, and the form by templates."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from millrace.errors import ConfigError, DataError
from millrace.gateway.call import Tool, ToolUse, TurnText, parsed
from millrace.gateway.call_form import CallForm, ReadCall
from millrace.gateway.format_proofs import (
    ROLES,
    STAND_IN,
    differs_without_tools,
    reads_behind_reasoning,
    takes_late_system,
    turn_ends,
    why_unproven,
)
from millrace.gateway.learn_call_form import learn_call_form
from millrace.gateway.recent import Recent
from millrace.rollout.chat import ChatFormat, check_kwargs, find_markers, load_tokenizer
from millrace.rollout.chat_template import ChatTemplate
from millrace.rollout.control_tokens import is_special
from millrace.rollout.reasoning import Reasoning, reasoning_keys
from millrace.rollout.sample import Message, images_in, text_of
from millrace.rollout.tools import ToolCall, typed
from millrace.rollout.vision import Vision, load_vision


class TurnFormat(Protocol):
    """How one model writes conversations. Name another one by its import path in `gateway.format`.

    stop_token_ids: tokens that end a turn of the model.
    """

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        """Return the token ids of a conversation, up to the start of the model's next turn.

        Raises DataError if the model can't read such messages.
        """
        ...

    def bridge(
        self, token_ids: Sequence[int], turn: Message, added: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[int, ...] | None:
        """Return the token ids between a turn of the model and its next one; None if they can't be appended.

        token_ids: of the conversation up to and including the turn, as they were sampled. turn: its last message.
        added: the messages after it.
        """
        ...

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that takes a turn's tokens bit by bit and returns what each bit adds to the text.

        The token that ends a turn adds nothing.
        """
        ...

    def read(self, text: str, tools: Sequence[Tool], *, ended: bool = True) -> TurnText:
        """Return the parts of a turn. A call has no id unless the model wrote one.

        ended: whether the text is whole. Otherwise the result has what is certain so far: reasoning and content that
        what follows can only extend, and calls that are complete.
        """
        ...

    def unreasoned(self) -> str:
        """Return the text with which a turn begins so that it has no reasoning; empty if it needs none."""
        ...

    def forced(self, name: str | None) -> str | None:
        """Return the text with which a turn begins so that it calls the tool `name`, or any tool if it is None.

        None if the format has no such text.
        """
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text with which a turn begins."""
        ...

    def has_placeholder(self, token_ids: Sequence[int]) -> bool:
        """Return whether a token stands for an image."""
        ...


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """The format of a model with a chat template, which it follows by rule: no model's name is known here.

    chat: how conversations become token ids. form: of its tool calls; None if the template writes none that can be
    read. system_anywhere: whether the template takes system messages after the first one; otherwise they become user
    messages. stop_token_ids: the tokens that end a turn before a user's message and before a tool's answer. unproven:
    the roles whose messages can't be appended to a turn, and why. tools_behind: whether what is appended depends on the
    tools; otherwise they are not rendered for it. heads: the tokens of the texts with which conversations begin, the
    tools and the system prompt, which many share.
    """

    chat: ChatFormat
    form: CallForm | None
    system_anywhere: bool
    stop_token_ids: tuple[int, ...]
    unproven: Mapping[str, str] = field(default_factory=dict)
    tools_behind: bool = True
    heads: Recent[str, tuple[int, ...]] = field(default_factory=Recent, repr=False, compare=False)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        chat = self._with(tools)
        texts, mark = chat.as_text(self._templated(messages))
        text = chat.template.render(texts)
        end = str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn))
        head, found, rest = text.partition(end)
        if not found:
            return chat.with_places(chat.encode(text, mark), messages)
        first = self.heads.get(head + found, lambda: chat.encode(head + found, mark))
        return chat.with_places(first + chat.encode(mark + rest, mark), messages)

    def bridge(
        self, token_ids: Sequence[int], turn: Message, added: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[int, ...] | None:
        """As the template writes `added` behind a turn with these tool calls; None if the turn ended in another way."""
        if any(str(message["role"]) in self.unproven for message in added):
            return None
        ids = self._after(turn, added, tools)
        if not ids or ids[0] not in self.stop_token_ids:
            return None
        last = token_ids[-1]
        if last == ids[0]:
            return ids[1:]
        return None if is_special(self.chat.tokenizer, last) else ids

    def decoder(self) -> Callable[[Sequence[int]], str]:
        stream, tokenizer = DecodeStream(skip_special_tokens=False), self.chat.tokenizer.backend_tokenizer
        ends = {*self.stop_token_ids, self.chat.tokenizer.eos_token_id}

        def decode(token_ids: Sequence[int]) -> str:
            steps = (stream.step(tokenizer, token) for token in token_ids if token not in ends)
            return "".join(step for step in steps if step)

        return decode

    def read(self, text: str, tools: Sequence[Tool], *, ended: bool = True) -> TurnText:
        thought, rest = split_reasoning(text, self.chat.reasoning, ended=ended)
        thought = thought.strip()
        if self.form is None or not tools:
            return TurnText(thought, _shown(rest, "", ended=ended))
        calls, bad = self.form.read(rest)
        start = calls[0].start if calls else bad.start if bad else len(rest)
        before, after = rest[:start], rest[calls[-1].end if calls else start :]
        if not ended:
            marker = "" if calls or bad else self.form.start
            if not self.form.start and not calls and rest.lstrip()[:1] == "{":  # it may become a call without a marker
                before = ""
            done = [call for call in calls if call.closed]
            return TurnText(thought, _shown(before, marker, ended=False), self._uses(done, tools))
        content = "\n".join(filter(None, (before.strip(), after.strip()))) if calls else rest.strip()
        return TurnText(thought, content, self._uses(calls, tools), bad.reason if bad else None)

    def unreasoned(self) -> str:
        reasoning = self.chat.reasoning
        return f"\n{reasoning.closing}\n\n" if reasoning.opened else ""

    def forced(self, name: str | None) -> str | None:
        if self.form is None or (name is None and not self.form.start):
            return None
        return self.unreasoned() + self.form.forced(name)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.chat.turn(text)[:-1]

    def has_placeholder(self, token_ids: Sequence[int]) -> bool:
        return self.chat.has_placeholder(token_ids)

    def _with(self, tools: Sequence[Tool]) -> ChatFormat:
        chat = self.chat
        return replace(chat, template=replace(chat.template, tools=tuple(tools)))

    def _after(self, turn: Message, added: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        """Return the token ids that the template writes behind a turn; they start with the token that ends it."""
        chat = self._with(tools if self.tools_behind else ())
        texts, mark = chat.as_text(self._templated(added))
        calls = turn.get("tool_calls")
        stand_in = self._stand_in(calls if isinstance(calls, list | tuple) else ())
        text = chat.template.render([{"role": "user", "content": "question"}, stand_in, *texts])
        _, found, rest = text.rpartition(STAND_IN)
        if not found:
            return ()
        ids = chat.with_places(chat.encode(rest, mark), added)
        first = next((i for i, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        return ids[first:]

    def _stand_in(self, calls: Sequence[Mapping[str, Any]]) -> Message:
        """Return a turn with these tool calls, whose last argument or text is the stand-in.

        Its reasoning is a space, because some templates write turns without reasoning in another form.
        """
        if not calls or self.form is None:
            return {"role": "assistant", "content": STAND_IN, **reasoning_keys(" ")}
        arguments: object = {"argument": STAND_IN}
        if self.form.as_text:
            arguments = orjson.dumps(arguments).decode()
        made = [{**call, "function": {"name": call["function"]["name"], "arguments": arguments}} for call in calls]
        return {"role": "assistant", "content": "", "tool_calls": made, **reasoning_keys(" ")}

    def _templated(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages as the template takes them."""
        return [self._message(message, first=not i) for i, message in enumerate(messages)]

    def _message(self, message: Message, *, first: bool) -> Message:
        kept = {key: value for key, value in message.items() if key not in ("reasoning", "tool_calls")}
        if message["role"] == "system" and not (first or self.system_anywhere):
            kept["role"] = "user"
        if not images_in([message]):
            kept["content"] = text_of(message.get("content") or "")
        if thought := message.get("reasoning"):
            kept |= reasoning_keys(str(thought))
        calls = message.get("tool_calls")
        if isinstance(calls, list | tuple):
            kept["tool_calls"] = [self._call(call) for call in calls]
        return kept

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        arguments = call["function"]["arguments"]
        if not (self.form and self.form.as_text):
            value = parsed(arguments)
            arguments = value if isinstance(value, Mapping) else {}
        return {**call, "function": {"name": call["function"]["name"], "arguments": arguments}}

    def _uses(self, calls: Sequence[ReadCall], tools: Sequence[Tool]) -> tuple[ToolUse, ...]:
        return tuple(ToolUse("", call.name, self._arguments(call, tools)) for call in calls)

    def _arguments(self, call: ReadCall, tools: Sequence[Tool]) -> str:
        """Return a call's arguments as JSON; in markup they are texts, whose types are those of the tool's schema."""
        assert self.form is not None
        schema = next((tool for tool in tools if name_of(tool) == call.name), None)
        if self.form.kind != "markup" or schema is None:
            return call.arguments
        values = ToolCall(call.name, orjson.loads(call.arguments), typed=False)
        return orjson.dumps(typed(values, schema).arguments).decode()


def load_format(
    path: str | Path, name: str = "template", template_kwargs: Mapping[str, object] | None = None
) -> TurnFormat:
    """Load the format of a model folder or Hub name.

    name: `template`, `renderers`, `renderers:NAME` with the name of a renderer, or `package.module:name` of a function
    that takes the path and returns a TurnFormat.

    Raises ConfigError if there is no such function or renderer, and DataError if the model's files don't suffice.
    """
    if name == "template":
        return load_template_format(path, template_kwargs)
    module, colon, attribute = name.partition(":")
    if module == "renderers":
        from millrace.gateway.renderers_format import load_renderers_format  # the package is an extra

        return load_renderers_format(str(path), attribute or "auto", template_kwargs)
    if not colon:
        raise ConfigError(f"gateway.format: {name!r} is neither `template`, `renderers` nor `package.module:name`")
    try:
        made: TurnFormat = getattr(importlib.import_module(module), attribute)(str(path))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"gateway.format: {name} can't be imported: {error}") from error
    return made


def load_template_format(path: str | Path, template_kwargs: Mapping[str, object] | None = None) -> TemplateFormat:
    """Load tokenizer and chat template of a model folder or Hub name, and learn and check how it writes turns.

    Raises DataError if tokenizer or template is missing, the template lacks a variable of `template_kwargs`, or it ends
    turns with no special token.
    """
    path = str(path)
    return learn_format(load_tokenizer(path), path, template_kwargs, load_vision(path))


def learn_format(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    template_kwargs: Mapping[str, object] | None = None,
    vision: Vision | str = "its folder was not looked at",
) -> TemplateFormat:
    """As `load_template_format`, for a tokenizer. Raises DataError, whose message starts with `name`."""
    template = ChatTemplate(tokenizer, (), template_kwargs or {})
    try:
        check_kwargs(template)
        reasoning, control = find_markers(template)
        form = learn_call_form(
            lambda messages, tools, prompt: replace(template, tools=tuple(tools)).render(messages, prompt)
        )
        ends = turn_ends(template, form)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    chat = ChatFormat(template, ends[0], reasoning, control, vision=vision)
    found = TemplateFormat(chat, form, takes_late_system(template), tuple(dict.fromkeys(ends)))
    if not reads_behind_reasoning(found):
        log.warning("%s: tool calls behind reasoning can't be told from it, so no tool calls are read", name)
        found = replace(found, form=None)
    unproven = {role: why for role in ROLES if (why := why_unproven(found, role)) is not None}
    for role, why in unproven.items():
        log.warning("%s: messages of the role %s can't be appended to a turn: %s", name, role, why)
    stops = ends[:1] if "tool" in unproven else ends
    found = replace(found, unproven=unproven, stop_token_ids=tuple(dict.fromkeys(stops)))
    return replace(found, tools_behind=differs_without_tools(found))


def split_reasoning(text: str, reasoning: Reasoning, *, ended: bool) -> tuple[str, str]:
    """Return the reasoning at the start of a turn, and the rest, where markers are text.

    ended: whether the text is whole; otherwise nothing is returned that a marker which has only begun could take away.
    """
    if reasoning.opened:
        text = reasoning.opening + text
    start = text.lstrip()
    if not start.startswith(reasoning.opening):
        begun = not ended and reasoning.opening.startswith(start)
        return "", "" if begun else text
    thought, closed, rest = start.removeprefix(reasoning.opening).partition(reasoning.closing)
    return (thought, rest) if closed or ended else (held_back(thought, reasoning.closing), "")


def held_back(text: str, *markers: str) -> str:
    """Return a text without an end that may become one of the markers."""
    longest = max(map(len, markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(length < len(marker) and text.endswith(marker[:length]) for marker in markers):
            return text[:-length]
    return text


def _shown(text: str, marker: str, *, ended: bool) -> str:
    return text.strip() if ended else held_back(text, marker).strip()


def name_of(tool: Tool) -> object:
    """Return the name of a tool by its JSON schema."""
    match tool:
        case {"function": {"name": name}}:
            return name
    return None
