"""How a model's conversations become token ids, and its turns become text: the port, and the form by templates."""

import importlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from millrace.errors import ConfigError, DataError
from millrace.gateway.call import Tool, ToolUse, TurnText, parsed
from millrace.gateway.call_form import CallForm, ReadCall, learn_call_form
from millrace.rollout.chat import ChatFormat, check_kwargs, find_markers, load_tokenizer
from millrace.rollout.chat_template import ChatTemplate
from millrace.rollout.control_tokens import encode, is_special
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


_STAND_IN, _NAME = f"millrace-{secrets.token_hex(8)}", "millrace_tool"  # no text of an agent has it
ROLES = ("user", "tool")  # of the messages behind a turn
_QUESTION: Message = {"role": "user", "content": "question"}
_ANSWERED: Message = {"role": "assistant", "content": "an answer", **reasoning_keys(" ")}
_ANSWER: Message = {"role": "tool", "content": "an answer", "name": _NAME, "tool_call_id": "milrace01"}
_TOOL: Tool = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}
log = logging.getLogger(__name__)


class Heads:
    """The tokens of the texts with which conversations begin: the tools and the system prompt, which many share."""

    def __init__(self, most: int = 64) -> None:
        self._kept: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._most = most

    def get(self, text: str, make: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the tokens of a text, which are made if they are not known."""
        ids = self._kept.pop(text, None)
        ids = make() if ids is None else ids
        self._kept[text] = ids
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return ids


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """The format of a model with a chat template, which it follows by rule: no model's name is known here.

    chat: how conversations become token ids. form: of its tool calls; None if the template writes none that can be
    read. system_anywhere: whether the template takes system messages after the first one; otherwise they become user
    messages. stop_token_ids: the tokens that end a turn before a user's message and before a tool's answer. unproven:
    the roles whose messages can't be appended to a turn, and why. tools_behind: whether what is appended depends on the
    tools; otherwise they are not rendered for it.
    """

    chat: ChatFormat
    form: CallForm | None
    system_anywhere: bool
    stop_token_ids: tuple[int, ...]
    unproven: Mapping[str, str] = field(default_factory=dict)
    tools_behind: bool = True
    heads: "Heads" = field(default_factory=lambda: Heads(), repr=False, compare=False)

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
        _, found, rest = text.rpartition(_STAND_IN)
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
            return {"role": "assistant", "content": _STAND_IN, **reasoning_keys(" ")}
        arguments: object = {"argument": _STAND_IN}
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
        ends = _ends(template, form)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    chat = ChatFormat(template, ends[0], reasoning, control, vision=vision)
    found = TemplateFormat(chat, form, _takes_late_system(template), tuple(dict.fromkeys(ends)))
    if not _reads_behind_reasoning(found):
        log.warning("%s: tool calls behind reasoning can't be told from it, so no tool calls are read", name)
        found = replace(found, form=None)
    unproven = {role: why for role in ROLES if (why := _why_unproven(found, role)) is not None}
    for role, why in unproven.items():
        log.warning("%s: messages of the role %s can't be appended to a turn: %s", name, role, why)
    stops = ends[:1] if "tool" in unproven else ends
    found = replace(found, unproven=unproven, stop_token_ids=tuple(dict.fromkeys(stops)))
    return replace(found, tools_behind=_differs_without_tools(found))


def _ends(template: ChatTemplate, form: CallForm | None) -> list[int]:
    """Return the special tokens that follow a turn before a user's message, and before a tool's answer.

    Raises DataError if there is none before a user's message.
    """
    plain = template.render([_QUESTION, {"role": "assistant", "content": _STAND_IN, **reasoning_keys(" ")}, _QUESTION])
    ends = [_first_special(template, plain.rpartition(_STAND_IN)[2])]
    if form is not None:
        arguments: object = {"argument": _STAND_IN}
        turn = _calling(form, arguments)
        with suppress(DataError):
            rest = replace(template, tools=(_TOOL,)).render([_QUESTION, turn, _ANSWER]).rpartition(_STAND_IN)[2]
            for marker in (form.closing, form.end):
                rest = rest.partition(marker)[2] if marker and marker in rest else rest
            ends.append(_first_special(template, rest))
        header = template.render([_QUESTION]).rpartition("question")[2]
        if ends[-1] not in ends[:1] and ends[-1] in encode(template.tokenizer, header):  # it starts the next turn
            ends[-1:] = [_first_special(template, form.closing + form.end)]
    return ends


def _first_special(template: ChatTemplate, text: str) -> int:
    tokenizer = template.tokenizer
    for token in encode(tokenizer, text):
        if is_special(tokenizer, token):
            return token
    raise DataError("the chat template ends the model's turn with no special token")


def _takes_late_system(template: ChatTemplate) -> bool:
    late = {"role": "system", "content": _STAND_IN}
    try:
        return _STAND_IN in template.render([_QUESTION, late, _QUESTION])
    except DataError:
        return False


def _why_unproven(found: TemplateFormat, role: str) -> str | None:
    """Return why messages of a role can't be appended; None if what is appended is what the template writes there."""
    if role == "tool" and found.form is None:
        return "the template writes no tool calls that can be read"
    turn, added = _turn_before(found, role)
    asked: list[Message] = [{"role": "user", "content": "a first question"}]
    with suppress(DataError):  # Gemma's template refuses system messages
        system: Message = {"role": "system", "content": "a system prompt"}
        found.prompt([system, *asked], [_TOOL])
        asked.insert(0, system)
    try:
        bridge = _by_role(found, role, [_TOOL])
        whole = found.prompt([*asked, turn, added, turn, added], [_TOOL])
    except DataError as error:
        return str(error)
    if not bridge:
        return "no special token ends the turn before them"
    return (
        None if whole[-len(bridge) :] == bridge else "the template writes them in another way in a longer conversation"
    )


def _turn_before(found: TemplateFormat, role: str) -> tuple[Message, Message]:
    """Return a turn, and a message of a role that may follow it."""
    if role == "tool" and found.form is not None:
        return _calling(found.form, {"argument": "value"}), _ANSWER
    return _ANSWERED, {"role": "user", "content": "another question"}


def _differs_without_tools(found: TemplateFormat) -> bool:
    """Return whether what is appended to a turn depends on the tools."""
    try:
        return any(_by_role(found, role, [_TOOL]) != _by_role(found, role, []) for role in ROLES)
    except DataError:
        return True


def _by_role(found: TemplateFormat, role: str, tools: Sequence[Tool]) -> tuple[int, ...] | None:
    """Return the bridge to a message of a role; None if there is none. Raises DataError."""
    turn, added = _turn_before(found, role)
    bridges = (found.bridge((end,), turn, [added], tools) for end in found.stop_token_ids)
    return next(filter(None, bridges), None)


def _reads_behind_reasoning(found: TemplateFormat) -> bool:
    """Return whether a call that the template writes behind reasoning is read as one."""
    if found.form is None:
        return True
    turn = {**_calling(found.form, {"argument": "value"}), **reasoning_keys(_STAND_IN)}
    try:
        text = replace(found.chat.template, tools=(_TOOL,)).render([_QUESTION, turn], False)
    except DataError:  # it takes no such turn
        return True
    _, written, rest = text.rpartition(_STAND_IN)
    reasoning = found.chat.reasoning
    read = found.read(("" if reasoning.opened else reasoning.opening) + _STAND_IN + rest, [_TOOL])
    return not written or (read.reasoning == _STAND_IN and [call.name for call in read.calls] == [_NAME])


def _calling(form: CallForm, arguments: object) -> Message:
    if form.as_text:
        arguments = orjson.dumps(arguments).decode()
    call = {"id": "milrace01", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **reasoning_keys(" ")}


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


def held_back(text: str, marker: str) -> str:
    """Return a text without an end that may become the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
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
