"""How a model writes tool calls, learned from its own chat template, which renders calls of stand-in functions."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import orjson

from millrace.errors import DataError
from millrace.gateway.call_form import CallForm, literal, read_json
from millrace.rollout.reasoning import QUESTION, reasoning_keys
from millrace.rollout.sample import Message

Render = Callable[[Sequence[Message], Sequence[Mapping[str, object]], bool], str]  # messages, tools, prompt follows

_NAMES = ("millrace_first", "millrace_second")
_KEYS, _VALUES = ("millrace_key_a", "millrace_key_b"), ("millrace value a", "millrace value b")
_IDS = ("milrace01", "milrace02")  # Mistral takes ids of nine letters and digits
_TEXT = "\N{SECTION SIGN}"  # the content of a turn without calls


def learn_call_form(render: Render) -> CallForm | None:
    """Return the form in which a chat template writes tool calls; None if it writes none, or in no form that is known.

    The form is checked: calls that the template writes with it are read as they were.
    """
    turns: tuple[dict[str, object], ...] = ({"content": "", **reasoning_keys(" ")}, {"content": None})
    for as_text, rest in itertools.product((False, True), turns):
        with suppress(DataError, ValueError):
            form = _learn(render, rest, as_text=as_text)
            if form is not None and _reads_back(form, render, rest, as_text=as_text):
                return replace(form, as_text=as_text)
    return None


def _learn(render: Render, rest: Mapping[str, object], *, as_text: bool) -> CallForm | None:
    values = dict(zip(_KEYS, _VALUES, strict=True))
    plain = _turn(render, {**rest, "content": _TEXT})
    tail = plain.partition(_TEXT)[2]
    one = _turn(render, _calling([(_NAMES[0], values)], rest, as_text=as_text)).removesuffix(tail)
    if (core := _core(one, _NAMES[0], values)) is None:
        return None
    start, end, form = core
    opening, closing = one[len(_common_prefix(one, plain)) : start], one[end:]
    try:
        two = _turn(render, _calling([(name, values) for name in _NAMES], rest, as_text=as_text)).removesuffix(tail)
    except DataError:  # it takes one call only
        two = ""
    first, second = _core(two, _NAMES[0], values), _core(two, _NAMES[1], values)
    if first is None or second is None:
        return replace(form, opening=opening.strip(), closing=closing.strip())
    between = two[first[1] : second[0]]
    each = _common_suffix(between, opening)
    shut = _common_prefix(between.removesuffix(each), closing)
    return replace(
        form,
        section=opening.removesuffix(each).strip(),
        opening=each.strip(),
        closing=shut.strip(),
        separator=between.removesuffix(each).removeprefix(shut).strip(),
        end=closing.removeprefix(shut).strip(),
    )


def _core(text: str, name: str, values: Mapping[str, str]) -> tuple[int, int, CallForm] | None:
    """Return where a call's name and arguments start and end, with the form of what is between."""
    at = text.find(name)
    if at < 0:
        return None
    for brace in [place for place, char in enumerate(text[:at]) if char == "{"]:
        value, end = _tried(text, brace)
        if isinstance(value, dict) and (keys := _keys(value, name, values)):
            return brace, end, CallForm("object", keys=keys)
    name_end = at + len(name)
    brace = text.find("{", name_end)
    value, end = _tried(text, brace)
    if value == values:
        return at, end, CallForm("named", before_args=text[name_end:brace].strip())
    return _markup(text, at, name_end)


def _markup(text: str, at: int, name_end: int) -> tuple[int, int, CallForm] | None:
    """As `_core`, for arguments in markup."""
    places = []
    place = name_end
    for one in (_KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1]):
        if (place := text.find(one, place)) < 0:
            return None
        places.append(place)
        place += len(one)
    key, value, next_key, next_value = places
    before_first, between = text[name_end:key], text[value + len(_VALUES[0]) : next_key]
    end = next_value + len(_VALUES[1])
    after_value = _common_prefix(between, text[end:])
    after_value = after_value[: after_value.rfind(">") + 1] or after_value  # the next tag may start in the same way
    before_value, before_key = text[key + len(_KEYS[0]) : value], between.removeprefix(after_value)
    if not before_key.strip() or not before_value or not after_value.strip():
        return None
    form = CallForm(
        "markup",
        before_args=before_first.removesuffix(before_key).removesuffix(before_key.lstrip()).strip(),
        before_key=before_key.strip(),
        before_value=before_value,
        after_value=after_value,
    )
    return at, end + len(after_value), form


def _reads_back(form: CallForm, render: Render, rest: Mapping[str, object], *, as_text: bool) -> bool:
    """Return whether a call of every type of argument is read as it was written."""
    values = {
        "text": 'a "quoted" <text>\nof two lines',
        "number": 7,
        "flag": True,
        "list": [1, "b"],
        "object": {"a": {}},
    }
    plain = _turn(render, {**rest, "content": _TEXT})
    turn = _turn(render, _calling([(_NAMES[0], values)], rest, as_text=as_text))
    turn = turn[len(_common_prefix(turn, plain)) :].removesuffix(plain.partition(_TEXT)[2])
    calls, bad = form.read(turn)
    if bad is not None or len(calls) != 1 or calls[0].name != _NAMES[0]:
        return False
    read = orjson.loads(calls[0].arguments)
    if form.kind == "markup":  # where the tool's schema gives the types
        read = {key: one if key == "text" else literal(str(one)) for key, one in read.items()}
    return bool(read == values)


def _turn(render: Render, turn: Message) -> str:
    """Return the text of a turn after a question, with what stands before it. Raises DataError."""
    tools = [_tool(name) for name in _NAMES]
    return render([{"role": "user", "content": QUESTION}, {"role": "assistant", **turn}], tools, False).rpartition(
        QUESTION
    )[2]


def _tool(name: str) -> Mapping[str, object]:
    parameters = {"type": "object", "properties": {key: {"type": "string"} for key in _KEYS}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def _calling(
    calls: Sequence[tuple[str, Mapping[str, object]]], rest: Mapping[str, object], *, as_text: bool
) -> Message:
    functions = [
        {"name": name, "arguments": orjson.dumps(values).decode() if as_text else dict(values)}
        for name, values in calls
    ]
    made = [{"id": _IDS[i], "type": "function", "function": one} for i, one in enumerate(functions)]
    return {**rest, "tool_calls": made}


def _keys(value: Mapping[str, object], name: str, values: Mapping[str, str]) -> tuple[str, str] | None:
    names = [key for key, one in value.items() if one == name]
    arguments = [
        key for key, one in value.items() if one == values or (isinstance(one, str) and literal(one) == values)
    ]
    return (names[0], arguments[0]) if names and arguments else None


def _tried(text: str, place: int) -> tuple[object, int]:
    try:
        return read_json(text, place)
    except ValueError:
        return None, place


def _common_prefix(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _common_suffix(one: str, other: str) -> str:
    return _common_prefix(one[::-1], other[::-1])[::-1]
