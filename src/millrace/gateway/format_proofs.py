"""What is proven of a chat template before its format is used: where turns end, and that messages can be appended."""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import orjson

from millrace.errors import DataError
from millrace.gateway.call import Tool
from millrace.gateway.call_form import CallForm
from millrace.rollout.chat_template import ChatTemplate
from millrace.rollout.control_tokens import encode, is_special
from millrace.rollout.reasoning import reasoning_keys
from millrace.rollout.sample import Message

if TYPE_CHECKING:
    from millrace.gateway.format import TemplateFormat

STAND_IN, _NAME = f"millrace-{secrets.token_hex(8)}", "millrace_tool"  # no text of an agent has it
ROLES = ("user", "tool")  # of the messages behind a turn
_QUESTION: Message = {"role": "user", "content": "question"}
_ANSWERED: Message = {"role": "assistant", "content": "an answer", **reasoning_keys(" ")}
_ANSWER: Message = {"role": "tool", "content": "an answer", "name": _NAME, "tool_call_id": "milrace01"}
_TOOL: Tool = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}


def turn_ends(template: ChatTemplate, form: CallForm | None) -> list[int]:
    """Return the special tokens that follow a turn before a user's message, and before a tool's answer.

    Raises DataError if there is none before a user's message.
    """
    plain = template.render([_QUESTION, {"role": "assistant", "content": STAND_IN, **reasoning_keys(" ")}, _QUESTION])
    ends = [_first_special(template, plain.rpartition(STAND_IN)[2])]
    if form is not None:
        arguments: object = {"argument": STAND_IN}
        turn = _calling(form, arguments)
        with suppress(DataError):
            rest = replace(template, tools=(_TOOL,)).render([_QUESTION, turn, _ANSWER]).rpartition(STAND_IN)[2]
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


def takes_late_system(template: ChatTemplate) -> bool:
    late = {"role": "system", "content": STAND_IN}
    try:
        return STAND_IN in template.render([_QUESTION, late, _QUESTION])
    except DataError:
        return False


def why_unproven(found: "TemplateFormat", role: str) -> str | None:
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


def _turn_before(found: "TemplateFormat", role: str) -> tuple[Message, Message]:
    """Return a turn, and a message of a role that may follow it."""
    if role == "tool" and found.form is not None:
        return _calling(found.form, {"argument": "value"}), _ANSWER
    return _ANSWERED, {"role": "user", "content": "another question"}


def differs_without_tools(found: "TemplateFormat") -> bool:
    """Return whether what is appended to a turn depends on the tools."""
    try:
        return any(_by_role(found, role, [_TOOL]) != _by_role(found, role, []) for role in ROLES)
    except DataError:
        return True


def _by_role(found: "TemplateFormat", role: str, tools: Sequence[Tool]) -> tuple[int, ...] | None:
    """Return the bridge to a message of a role; None if there is none. Raises DataError."""
    turn, added = _turn_before(found, role)
    bridges = (found.bridge((end,), turn, [added], tools) for end in found.stop_token_ids)
    return next(filter(None, bridges), None)


def reads_behind_reasoning(found: "TemplateFormat") -> bool:
    """Return whether a call that the template writes behind reasoning is read as one."""
    if found.form is None:
        return True
    turn = {**_calling(found.form, {"argument": "value"}), **reasoning_keys(STAND_IN)}
    try:
        text = replace(found.chat.template, tools=(_TOOL,)).render([_QUESTION, turn], False)
    except DataError:  # it takes no such turn
        return True
    _, written, rest = text.rpartition(STAND_IN)
    reasoning = found.chat.reasoning
    read = found.read(("" if reasoning.opened else reasoning.opening) + STAND_IN + rest, [_TOOL])
    return not written or (read.reasoning == STAND_IN and [call.name for call in read.calls] == [_NAME])


def _calling(form: CallForm, arguments: object) -> Message:
    if form.as_text:
        arguments = orjson.dumps(arguments).decode()
    call = {"id": "milrace01", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **reasoning_keys(" ")}
