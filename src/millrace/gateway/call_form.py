"""How a model writes tool calls, and how they are read. `learn_call_form` learns it from the model's chat template.

What stands around the names and the arguments is the form. Three kinds cover the families whose templates write
calls as text:

    object:   <tool_call>{"name": NAME, "arguments": {...}}</tool_call>     Hermes, Qwen2.5, Qwen3, Llama 3.1, Mistral
    named:    [TOOL_CALLS]NAME[ARGS]{...}                                   Mistral, DeepSeek
    markup:   <function=NAME><parameter=KEY>VALUE</parameter></function>    Qwen3-Coder, Qwen3.5, GLM, Nemotron
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

_FUNCTION = re.compile(r"[\w.:/-]+")


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A tool call in a text: its name, its arguments as a JSON text, and where it starts and ends.

    closed: whether its end is certain. A call without its closing marker is one only if the text ends there.
    """

    name: str
    arguments: str
    start: int
    end: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A text that starts as a tool call and can't be read as one."""

    reason: str
    start: int


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form of one model's tool calls. The texts are without the white space at their ends.

    section: what comes before the first call only. opening: what comes before each call. closing: what comes after it.
    separator: between calls. end: after the last call. keys: of the name and the arguments (kind object). before_args:
    between name and arguments. before_key, before_value, after_value: around the parts of an argument (kind markup).
    as_text: whether the template takes arguments as a JSON text in place of an object.
    """

    kind: Literal["object", "named", "markup"]
    section: str = ""
    opening: str = ""
    closing: str = ""
    separator: str = ""
    end: str = ""
    keys: tuple[str, str] = ("", "")
    before_args: str = ""
    before_key: str = ""
    before_value: str = ""
    after_value: str = ""
    as_text: bool = False

    @property
    def start(self) -> str:
        """The text with which calls begin; empty if a turn that is a call has no marker."""
        return _first_word(self.section or self.opening)

    def read(self, text: str, place: int = 0) -> tuple[list[ReadCall], Unreadable | None]:
        """Return the tool calls in a text from `place` on, and the first thing that starts as a call and is none.

        text: of a turn, without reasoning and end-of-turn token.
        """
        calls: list[ReadCall] = []
        while (start := self._next(text, place, first=not calls)) is not None:
            call = self._one(text, start)
            if isinstance(call, Unreadable):
                return calls, call
            calls.append(call)
            place = call.end
        return calls, None

    def _next(self, text: str, place: int, *, first: bool) -> int | None:
        """Return where the next call starts, section included; None if there is none."""
        if first and not self.start:  # a turn is a call, or text
            return place if text[place:].lstrip().startswith("{") and self._fits(text, place) else None
        if first:
            found = text.find(self.start, place)
            return None if found < 0 else found
        after = _skip(text, place, self.separator)
        if not self.opening:
            return after if after > place and text[after : after + 1] == "{" else None
        found = text.find(_first_word(self.opening), place)
        return None if found < 0 else found

    def _fits(self, text: str, place: int) -> bool:
        return isinstance(self._one(text, place), ReadCall)

    def _one(self, text: str, start: int) -> ReadCall | Unreadable:
        opens = _skip(text, start, self.section)
        place = _skip(text, opens, self.opening)
        if self.opening and place == opens:
            return Unreadable(f"a call starts with {self.opening!r}", start)
        try:
            name, arguments, place = self._parts(text, place)
        except ValueError as error:
            return Unreadable(str(error), start)
        closed = _skip(text, place, self.closing)
        if self.closing and closed == place and text[place:].strip():
            return Unreadable(f"{self.closing} is missing after the arguments", start)
        end = _skip(text, closed, self.end)
        return ReadCall(name, arguments, start, end, closed=not self.closing or closed > place)

    def _parts(self, text: str, place: int) -> tuple[str, str, int]:
        """Return name, arguments, and the place behind them. Raises ValueError."""
        match self.kind:
            case "object":
                return self._object(text, _white(text, place))
            case "named":
                name, place = self._named(text, place, (self.before_args, "{"))
                value, place = read_json(text, text.find("{", place))
                return name, _dumped(value), place
            case "markup":
                return self._markup(text, place)

    def _object(self, text: str, place: int) -> tuple[str, str, int]:
        value, end = read_json(text, place)
        match value:
            case dict() if isinstance(name := value.get(self.keys[0]), str):
                arguments = parsed_object(value.get(self.keys[1], {}))
                return name, _dumped(arguments), end
        raise ValueError(f"a call is an object with {self.keys[0]} and {self.keys[1]}")

    def _named(self, text: str, place: int, ends: Sequence[str]) -> tuple[str, int]:
        """Return the name at a place, and where it ends: before the first of these texts, or white space."""
        found = [at for end in (*ends, "\n") if end and (at := text.find(end, place + 1)) >= 0]
        end = min(found, default=len(text))
        name = text[place:end].strip()
        if not _FUNCTION.fullmatch(name):
            raise ValueError("a call has the name of a function")
        return name, _skip(text, end, self.before_args)

    def _markup(self, text: str, place: int) -> tuple[str, str, int]:
        stop = self.closing or self.end
        name, place = self._named(text, place, (self.before_args, self.before_key, stop))
        limit = text.find(stop, place) if stop else len(text)
        if limit < 0:
            raise ValueError(f"{stop} is missing")
        values: dict[str, str] = {}
        while (at := _white(text, place)) < len(text) and text.startswith(self.before_key, at):
            key_at = at + len(self.before_key)
            value_at, value_end = text.find(self.before_value.strip(), key_at), -1
            if value_at >= 0:
                value_end = text.find(self.after_value.strip(), value_at + len(self.before_value.strip()))
            if value_end < 0:
                raise ValueError(f"an argument lacks {self.before_value.strip()} or {self.after_value.strip()}")
            value = text[value_at + len(self.before_value.strip()) : value_end]
            if self.before_value.endswith("\n"):
                value = value.removeprefix("\n")
            if self.after_value.startswith("\n"):
                value = value.removesuffix("\n")
            values[text[key_at:value_at].strip()] = value
            place = value_end + len(self.after_value.strip())
        return name, _dumped(values), place

    def forced(self, name: str | None) -> str:
        """Return the text that a turn begins with so that it becomes a call, of the function `name` if it is given."""
        start = self.section + self.opening
        if name is None:
            return start
        match self.kind:
            case "object":
                return f'{start}\n{{"{self.keys[0]}": "{name}", "{self.keys[1]}": '
            case _:
                return f"{start}{name}{self.before_args}"


def parsed_object(value: object) -> object:
    """Return arguments as an object. Some models write them as JSON in a string. Raises ValueError."""
    if isinstance(value, str):
        value = orjson.loads(value)
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value


def literal(text: str) -> object:
    """Return the value of a text: JSON, or Python's True, False and None, which some templates write. None if none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"True": True, "False": False}.get(text)


def read_json(text: str, place: int) -> tuple[object, int]:
    """Return the JSON value at a place, and where it ends. Raises ValueError if there is none."""
    if place < 0:
        raise ValueError("the call has no arguments")
    try:
        return _DECODER.raw_decode(text, place)
    except RecursionError as error:
        raise ValueError("the arguments are nested too deeply") from error


def _first_word(text: str) -> str:
    return text.split(maxsplit=1)[0] if text else ""


def _dumped(value: object) -> str:
    """Return a value as JSON. Raises ValueError if other parsers of JSON would not take it."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # a whole number of more than 64 bits, half of a surrogate pair, or too many levels
        text = json.dumps(value)
    try:
        orjson.dumps(orjson.loads(text))
    except TypeError as error:
        raise ValueError("the arguments are nested too deeply") from error
    return text


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large a number")
    return number


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


# It also takes the line breaks that models leave in texts.
_DECODER = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_refused)


def _skip(text: str, place: int, expected: str) -> int:
    """Return the place after a text, if it is there, perhaps after white space. Otherwise the same place."""
    at = _white(text, place)
    return at + len(expected) if expected and text.startswith(expected, at) else place


def _white(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
