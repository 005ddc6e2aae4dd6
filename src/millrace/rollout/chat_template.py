"""A chat template with the arguments that all renderings share, and the stand-in for the model's turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from millrace.errors import DataError
from millrace.rollout.control_tokens import encode, is_special
from millrace.rollout.reasoning import QUESTION, Reasoning, reasoning_keys
from millrace.rollout.sample import Message
from millrace.rollout.tools import ToolCall, parse_tool_calls

_STAND_IN, _ANSWER = "millrace-stand-in-for-the-turn", "millrace-tool-answer"
_TOOL, _CALL_ID = "millrace_tool", "milrace{:02}"  # Mistral requires ids of nine letters and digits
# The arguments of the stand-in's calls: templates expect an object, or JSON in a string. None: a turn without calls.
_FORMS = ({"argument": _STAND_IN}, f'{{"argument": "{_STAND_IN}"}}', None)
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template and the arguments that every rendering uses.

    tools: JSON schemas. kwargs: keyword arguments of the template, such as `enable_thinking`.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: tuple[Mapping[str, object], ...]
    kwargs: Mapping[str, object]

    @property
    def source(self) -> str:
        """The template's Jinja source. If there are several, the one that transformers uses with these tools.

        Raises DataError if there is none.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=self._tools))
        except ValueError as error:
            raise DataError(first_line(error)) from error

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """Return the text of a conversation. Raises DataError if the template refuses the messages."""
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=self._tools,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.kwargs,
            )
        except _TEMPLATE_ERRORS as error:
            raise DataError(first_line(error)) from error
        return str(text)

    @property
    def _tools(self) -> list[dict[str, object]] | None:
        return [dict(tool) for tool in self.tools] or None


@dataclass(frozen=True, slots=True)
class StandInTurn:
    """A placeholder for the model's turn, after which the template can write tool answers.

    arguments: of the turn's tool calls; None if the template writes no calls, so that the turn is plain content. end:
    the text of the end-of-turn token.
    """

    template: ChatTemplate
    arguments: Mapping[str, str] | str | None
    end: str

    def around(self, tool_answers: Sequence[str], calls: int = 0) -> tuple[str, str]:
        """Return a rendered conversation in two parts, cut before the end-of-turn token of the model's turn.

        The second part is empty if this token does not follow the turn. `calls`: the number of tool calls in the turn;
        0 means one for each answer.
        """
        calls = calls or len(tool_answers)
        text = self.template.render([*_conversation(self.arguments, calls), *_answers(tool_answers)])
        before, stand_in, rest = text.partition(_STAND_IN)
        within, end, after = rest.partition(self.end)
        return before + stand_in + within, end + after

    def check(self, reasoning: Reasoning) -> None:
        """Raise DataError if tool answers can't be appended.

        This is so if the template rewrites earlier turns, needs to know which tool answered, or does not end the turn
        before the answer.
        """
        before, after = self.around([_ANSWER], calls=2)
        if _ANSWER not in after:
            raise DataError(f"the chat template does not end the turn before a tool's answer with {self.end}")
        if self.around([_ANSWER, "another answer"], calls=2)[0] != before:
            raise DataError("the chat template rewrites earlier turns when a tool has answered")
        if _TOOL in after or _CALL_ID.format(0) in after:
            raise DataError("the chat template writes the tool's name or the call's id beside an answer")
        first = self.template.render([_question()]).rpartition(QUESTION)[2]
        if reasoning.is_open(first) != reasoning.is_open(after):
            raise DataError(f"the chat template writes {reasoning.opening} before some of the model's turns only")

    def unread_call(self, reasoning: Reasoning) -> str | None:
        """Return a turn with a tool call, as the template writes it, if `parse_tool_calls` can't read it.

        Returns None if it can, or if the template writes no calls.
        """
        if self.arguments is None:
            return None
        turn = self.template.render(_conversation(self.arguments, 1), False).rpartition(QUESTION)[2]
        match parse_tool_calls(reasoning.answer(turn)):
            case (ToolCall(name=name, arguments=arguments),) if (name, arguments) == (_TOOL, {"argument": _STAND_IN}):
                return None
            case _:
                return turn


def stand_in_turn(template: ChatTemplate) -> StandInTurn:
    """Return the first form of turn that the template writes together with a tool answer.

    Raises DataError if there is none, or if no special token ends it.
    """
    reasons = []
    for arguments in _FORMS:
        try:
            text = template.render([*_conversation(arguments, 1), *_answers([_ANSWER])])
        except DataError as error:
            reasons.append(str(error))
            continue
        if _ANSWER in text.partition(_STAND_IN)[2]:
            return StandInTurn(template, arguments, _end_of_turn(template))
    if len(reasons) == len(_FORMS):
        raise DataError(f"the chat template can't write a tool's answer ({reasons[-1]})")
    raise DataError("the chat template does not write a tool's answer after the model's turn")


def _end_of_turn(template: ChatTemplate) -> str:
    """Return the special token after a turn that another message follows."""
    tokenizer = template.tokenizer
    after = template.render([*_conversation(None, 0), _question()]).partition(_STAND_IN)[2]
    ids = encode(tokenizer, after)
    if not ids or not is_special(tokenizer, ids[0]):
        raise DataError("the chat template ends the model's turn with no special token")
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def _question() -> Message:
    return {"role": "user", "content": QUESTION}


def _conversation(arguments: Mapping[str, str] | str | None, calls: int) -> list[Message]:
    """Return a question and the model's turn.

    Its reasoning is a space, because some templates (Qwen3) write turns without reasoning in another form.
    """
    if arguments is None:
        return [_question(), {"role": "assistant", "content": _STAND_IN, **reasoning_keys(" ")}]
    function = {"name": _TOOL, "arguments": arguments}
    tool_calls = [{"id": _CALL_ID.format(call), "type": "function", "function": function} for call in range(calls)]
    return [_question(), {"role": "assistant", "content": "", "tool_calls": tool_calls, **reasoning_keys(" ")}]


def _answers(texts: Sequence[str]) -> list[Message]:
    return [
        {"role": "tool", "name": _TOOL, "tool_call_id": _CALL_ID.format(index), "content": text}
        for index, text in enumerate(texts)
    ]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if there is no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
