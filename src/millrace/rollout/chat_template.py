"""A chat template with the arguments that all renderings share, and the stand-in for the model's turn."""

import itertools
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

    def around(self, messages: Sequence[Message], calls: int = 0) -> tuple[str, str]:
        """Return a rendered conversation in two parts, cut before the end-of-turn token of the model's turn.

        The second part has the messages, which follow the turn. It is empty if the end-of-turn token does not follow
        it. `calls`: the number of tool calls in the turn; 0 means one for each tool message.
        """
        calls = calls or sum(message["role"] == "tool" for message in messages)
        text = self.template.render([*_conversation(self.arguments, calls), *_named(messages)])
        before, stand_in, rest = text.partition(_STAND_IN)
        within, end, after = rest.partition(self.end)
        return before + stand_in + within, end + after

    def check_answers(self, reasoning: Reasoning) -> None:
        """Raise DataError if tool answers can't be appended.

        This is so if the template rewrites earlier turns, needs to know which tool answered, or does not end the turn
        before the answer.
        """
        before, after = self.around(_answers([_ANSWER]), calls=2)
        if _ANSWER not in after:
            raise DataError(f"the chat template does not end the turn before a tool's answer with {self.end}")
        if self.around(_answers([_ANSWER, "another answer"]), calls=2)[0] != before:
            raise DataError("the chat template rewrites earlier turns when a tool has answered")
        if _TOOL in after or _CALL_ID.format(0) in after:
            raise DataError("the chat template writes the tool's name or the call's id beside an answer")
        self._check_seam(before, after, reasoning)

    def check_user(self, reasoning: Reasoning) -> None:
        """Raise DataError if a user's message can't be appended.

        This is so if the template changes what comes before the turn, or does not end the turn before the message.
        """
        before, after = self.around([_user(_ANSWER)])
        if _ANSWER not in after:
            raise DataError(f"the chat template does not end the turn before a user's message with {self.end}")
        prompt = self.template.render([_question()])
        if before.partition(QUESTION)[0] != prompt.partition(QUESTION)[0]:
            raise DataError("the chat template rewrites earlier messages when a user has answered")
        self._check_seam(before, after, reasoning)

    def _check_seam(self, before: str, after: str, reasoning: Reasoning) -> None:
        first = self.template.render([_question()]).rpartition(QUESTION)[2]
        if reasoning.is_open(first) != reasoning.is_open(after):
            raise DataError(f"the chat template writes {reasoning.opening} before some of the model's turns only")
        tokenizer = self.template.tokenizer
        if encode(tokenizer, before + after) != encode(tokenizer, before) + encode(tokenizer, after):
            raise DataError("the tokens of a turn depend on the text after it, so turns can't be appended")

    def token(self) -> int:
        """Return the id of the end-of-turn token."""
        return encode(self.template.tokenizer, self.end)[0]

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


def turn_before_user(template: ChatTemplate) -> StandInTurn:
    """Return the placeholder after which a user's message follows. Raises DataError if no special token ends it."""
    return StandInTurn(template, None, _end_of_turn(template))


def _end_of_turn(template: ChatTemplate) -> str:
    """Return the special token after a turn that another message follows."""
    tokenizer = template.tokenizer
    after = template.render([*_conversation(None, 0), _question()]).partition(_STAND_IN)[2]
    ids = encode(tokenizer, after)
    if not ids or not is_special(tokenizer, ids[0]):
        raise DataError("the chat template ends the model's turn with no special token")
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _question() -> Message:
    return _user(QUESTION)


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
    return _named([{"role": "tool", "content": text} for text in texts])


def _named(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, those of tools with the name and the ids of the stand-in's calls."""
    ids = itertools.count()
    return [
        {**message, "name": _TOOL, "tool_call_id": _CALL_ID.format(next(ids))} if message["role"] == "tool" else message
        for message in messages
    ]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty, or its type's name if there is none."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)
