"""Tool calls are read as the chat templates of real models write them, and as the models themselves do."""

import json
from collections.abc import Mapping, Sequence

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millrace.gateway.call import ToolUse
from millrace.gateway.call_form import CallForm, ReadCall, literal
from tests.gateway.formats import (
    CALLS_AS_TEXT,
    KINDS,
    ONE_CALL,
    READABLE,
    VALUES,
    WORDS,
    format_of,
    tool,
    turn_text,
)


@pytest.mark.parametrize("name", READABLE)
def test_which_kind_of_calls_each_template_writes(name: str) -> None:
    form = format_of(name).form
    assert (None if form is None else form.kind) == KINDS.get(name)
    assert form is None or form.as_text == (name in CALLS_AS_TEXT)


MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "</function>",
    "<think>",
    "</think>",
    "<|im_end|>",
    "```",
    "<｜tool▁call▁end｜>",
]
HARD = st.lists(st.sampled_from([*MARKERS, "{", "}", '"', "\\", "\n", " ", "é", "a"]), max_size=8).map("".join)


def form_of(name: str) -> CallForm:
    form = format_of(name).form
    assert form is not None
    return form


def call_of(function: str, arguments: Mapping[str, object], number: int, *, as_text: bool) -> dict[str, object]:
    given = json.dumps(arguments, ensure_ascii=False) if as_text else dict(arguments)
    return {"id": f"milrace{number:02}", "type": "function", "function": {"name": function, "arguments": given}}


def texts(calls: Sequence[ReadCall | ToolUse]) -> list[tuple[str, object]]:
    return [(call.name, orjson.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind != "markup"])
@settings(max_examples=40)
@given(arguments=st.lists(st.dictionaries(WORDS, VALUES | HARD, max_size=3), min_size=1, max_size=3))
@example(arguments=[{"a": 2**64 - 1, "b": -(2**63), "c": 1e300, "d": "</tool_call>"}])
def test_calls_in_json_are_read_as_the_template_writes_them(name: str, arguments: list[dict[str, object]]) -> None:
    arguments = arguments[:1] if name in ONE_CALL else arguments
    form = form_of(name)
    calls = [call_of(f"do_{i}", one, i, as_text=form.as_text) for i, one in enumerate(arguments)]
    text = turn_text(name, {"content": "", "tool_calls": calls}, tools := [tool(f"do_{i}") for i in range(3)])
    read = format_of(name).read(text, tools)
    assert read.malformed is None
    assert texts(read.calls) == [(f"do_{i}", one) for i, one in enumerate(arguments)]


KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "markup"])
@settings(max_examples=40)
@given(arguments=st.lists(st.dictionaries(KEYS, VALUES | HARD, max_size=3), min_size=1, max_size=3))
def test_calls_in_markup_are_read_as_the_template_writes_them(name: str, arguments: list[dict[str, object]]) -> None:
    """By the types of the tool's schema. Texts with the marker that ends an argument are the one exception."""
    form = form_of(name)
    clean = [{key: _without(value, form.after_value.strip()) for key, value in one.items()} for one in arguments]
    tools = [tool(f"do_{i}", **{key: _type(value) for key, value in one.items()}) for i, one in enumerate(clean)]
    calls = [call_of(f"do_{i}", one, i, as_text=False) for i, one in enumerate(clean)]
    text = turn_text(name, {"content": "", "tool_calls": calls}, tools)
    read = format_of(name).read(text, tools)
    assert read.malformed is None
    assert texts(read.calls) == [(f"do_{i}", one) for i, one in enumerate(clean)]


def _without(value: object, marker: str) -> object:
    text = json.dumps(value, ensure_ascii=False)
    return "x" if marker in text else value


def _type(value: object) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


HERMES, CODER, GLM, LLAMA, DEEPSEEK = "qwen3", "qwen3_5_nothink", "glm4moe", "llama3_1", "deepseekv3"
ADD = ("add", {"a": 1})


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [ADD]),
        (HERMES, 'I see.\n<tool_call>{"name":"add","arguments":{"a":1}}</tool_call> Done.', [ADD]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [ADD]),  # the other way round
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [ADD]),  # as a text
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}}', [ADD]),  # the closing marker is missing
        (HERMES, '<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
        (HERMES, '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 3, [("now", {})] * 3),
        (
            HERMES,
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\nand then\n'
            '<tool_call>\n{"name": "write", "arguments": {"text": "one\ntwo </tool_call>"}}\n</tool_call>',
            [ADD, ("write", {"text": "one\ntwo </tool_call>"})],
        ),
        (HERMES, "I call nothing. {}", []),
        (
            CODER,
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            [("add", {"a": "1"})],
        ),
        (CODER, "<tool_call>\n<function=now>\n</function>\n</tool_call>", [("now", {})]),
        (
            CODER,
            "Now.\n<tool_call>\n<function=write>\n<parameter=text>\n  if a < b:\n    pass\n\n</parameter>\n"
            "<parameter=path>\na.py\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
            [("write", {"text": "  if a < b:\n    pass\n", "path": "a.py"}), ("now", {})],
        ),
        (GLM, "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", [("add", {"a": "1"})]),
        (GLM, "\n<tool_call>now\n</tool_call>\n<tool_call>now\n</tool_call>", [("now", {})] * 2),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}', [ADD]),
        (LLAMA, '  {"name": "add", "parameters": {"a": 1}}\n', [ADD]),
        (LLAMA, 'Sure: {"name": "add", "parameters": {"a": 1}}', []),
        (LLAMA, '{"a": 1}', []),  # an answer in JSON
        (
            DEEPSEEK,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{\"a\": 1}\n```"
            "<｜tool▁call▁end｜>\n"
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [ADD, ("now", {})],
        ),
    ],
)  # fmt: skip
def test_what_models_write(name: str, text: str, calls: list[tuple[str, object]]) -> None:
    read, bad = form_of(name).read(text)
    assert bad is None
    assert texts(read) == calls


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "Expecting ',' delimiter"),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments are no object"),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>', "a call is an object with name and arguments"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>', "1e999 is too large a number"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogate"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 500 + "]" * 500 + "}}", "too deeply"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 9000 + "]" * 9000 + "}}", "too deeply"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {}} and <tool_call>', "</tool_call> is missing"),
        (HERMES, "<tool_call>add</tool_call>", "Expecting value"),
        (HERMES, "<tool_call>", "Expecting value"),
        (CODER, "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n", "is missing"),
        (CODER, "<tool_call>\n<function=add>\n<parameter=a>\n1\n</function>\n</tool_call>", "an argument lacks"),
        (CODER, "<tool_call>\nadd\n</tool_call>", "a call starts with"),
        (GLM, "<tool_call>add\n<arg_key>a</arg_key>\n</tool_call>", "an argument lacks"),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>add", "a call starts with"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_named(name: str, text: str, says: str) -> None:
    read, bad = form_of(name).read(text)
    assert read == []
    assert bad is not None
    assert says in bad.reason


def test_a_bad_call_after_good_ones_keeps_those() -> None:
    good = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    read, bad = form_of(HERMES).read(f"{good}\n<tool_call>add(1)</tool_call>")
    assert texts(read) == [ADD]
    assert bad is not None
    assert bad.start == len(good) + 1


def test_whole_numbers_of_any_size_are_kept() -> None:
    [call], _ = form_of(HERMES).read(f'<tool_call>{{"name": "add", "arguments": {{"a": {10**30}}}}}</tool_call>')
    assert json.loads(call.arguments) == {"a": 10**30}


@given(st.text())
def test_reading_never_fails(text: str) -> None:
    for name in (HERMES, CODER, GLM, LLAMA, DEEPSEEK):
        form = form_of(name)
        start = form.section + form.opening
        for one in (text, start + text, f"{start}f{form.before_args}{text}"):
            calls, _ = form.read(one)
            assert all(isinstance(orjson.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize("name", KINDS)
def test_a_forced_call_is_read_as_one(name: str) -> None:
    turns, form = format_of(name), form_of(name)
    tools = [tool("add", a="integer")]
    written = turn_text(name, {"content": "", "tool_calls": [call_of("add", {"a": 1}, 0, as_text=form.as_text)]}, tools)
    forced = turns.forced("add")
    assert forced is not None
    rest = {
        "object": '{"a": 1}}',
        "named": '\n{"a": 1}\n',
        "markup": f"\n{form.before_key}a{form.before_value}1{form.after_value}\n",
    }
    turn = turns.read(forced + rest[form.kind] + form.closing + form.end, tools)
    assert (turn.malformed, turn.content, turn.reasoning) == (None, "", "")
    assert texts(turn.calls) == [("add", {"a": 1})]
    start = turns.forced(None)
    assert (start is None) == (not form.start)
    assert start is None or (form.section + form.opening in written and start.endswith(form.section + form.opening))


def test_values_of_python_are_read_as_those_of_json() -> None:
    assert [literal(text) for text in ("True", "False", "None", "1.5", "word")] == [True, False, None, 1.5, None]
