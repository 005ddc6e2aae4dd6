"""Tools: the expressions that the calculator evaluates or refuses. Any bad call gets an error as its answer."""

import asyncio
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.tools import (
    BadToolCall,
    Calculator,
    Tool,
    ToolCall,
    ToolError,
    answer_tool_call,
    evaluate,
    format_number,
    parse_tool_calls,
)

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 7"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("12 * 7", "84"), ("84/12", "7"), ("7/2", "3.5"), ("1/3", "0.3333333333"), ("-3 + +1", "-2"), ("7 // 2", "3"),
     ("7 % 4", "3"), ("2**10", "1024"), ("(1 + 2) * (3 - 4)", "-3"), ("1,234 + 1", "1235"), ("1,234,567", "1234567"),
     ("0.1 + 0.2", "0.3"), ("10 ** 20", "100000000000000000000"), ("4.0", "4"), (" 2 ", "2"), ("1e3", "1000"),
     ("2 ** -1", "0.5"), ("-7 // 2", "-4")],
)  # fmt: skip
def test_arithmetic(expression: str, answer: str) -> None:
    assert format_number(evaluate(expression)) == answer


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "two", "abs(-1)", "__import__('os')", "(1).real", "[1][0]", "True + 1", "'a' * 9", "1 if 1 else 2",
     "1 < 2", "1, 2", "1/0", "0 ** -1", "7 % 0", "9**9**9", "10**1000 * 10**1000", "2.0 ** 5000", "(-8) ** 0.5",
     "1e400", "1e308 * 10", "(" * 300 + "1" + ")" * 300, "1" * 501, "1 << 5", "~1", "1j * 1j",
     "\0", "x := 1", "10**300 / 10**-300", "9" * 490 + ".0"],
)  # fmt: skip
def test_what_the_calculator_refuses(expression: str) -> None:
    with pytest.raises(ToolError):
        evaluate(expression)


@given(st.text(alphabet="0123456789.+-*/% ()e,", max_size=60))
def test_any_expression_gives_a_finite_number_or_a_tool_error(expression: str) -> None:
    try:
        value = evaluate(expression)
    except ToolError:
        return
    assert isinstance(value, int) or math.isfinite(value)
    assert format_number(value)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.sampled_from("+-*"))
def test_whole_numbers_stay_whole(left: int, right: int, operator: str) -> None:
    answer = format_number(evaluate(f"{left} {operator} ({right})"))
    assert int(answer) == {"+": left + right, "-": left - right, "*": left * right}[operator]


def test_calls_are_read_in_order_with_the_text_around_them() -> None:
    text = f"Let me see. {CALL} and {CALL.replace('12 * 7', '1 + 1')}<|im_end|>"
    assert parse_tool_calls(text) == (
        ToolCall("calculator", {"expression": "12 * 7"}),
        ToolCall("calculator", {"expression": "1 + 1"}),
    )
    assert parse_tool_calls("#### 84<|im_end|>") == ()


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", "<tool_call></tool_call>", "<tool_call>12 * 7</tool_call>", "<tool_call>[]</tool_call>",
     '<tool_call>{"name": "calculator"}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
     '<tool_call>{"name": "calculator", "arguments": "12 * 7"}</tool_call>', CALL.removesuffix("</tool_call>")],
)  # fmt: skip
def test_a_call_that_cant_be_read_is_a_bad_call(text: str) -> None:
    (call,) = parse_tool_calls(text)
    assert isinstance(call, BadToolCall)
    assert call.reason


@given(st.text())
def test_parsing_never_raises(text: str) -> None:
    assert len(parse_tool_calls(f"<tool_call>{text}</tool_call>")) >= 1
    assert len(parse_tool_calls(f"<tool_call><function={text}</tool_call>")) >= 1


def test_calls_with_parameters_in_tags() -> None:
    text = (
        "<tool_call>\n<function=calculator>\n<parameter=expression>\n12\n* 7\n</parameter>\n</function>\n</tool_call>"
    )
    assert (
        parse_tool_calls(f"So: {text}{text}") == (ToolCall("calculator", {"expression": "12\n* 7"}, typed=False),) * 2
    )
    assert parse_tool_calls("<tool_call><function=now></function></tool_call>") == (ToolCall("now", {}, typed=False),)


@pytest.mark.parametrize(
    "body", ["<function=", "<function=calculator>", "<function=calculator><parameter=expression>1</parameter>",
             "<function=>\n</function>", "<function=a></function> and more"],
)  # fmt: skip
def test_a_call_in_tags_that_cant_be_read_is_a_bad_call(body: str) -> None:
    (call,) = parse_tool_calls(f"<tool_call>{body}</tool_call>")
    assert isinstance(call, BadToolCall)
    assert "</function>" in call.reason


class Broken(Tool):
    name = "broken"

    @property
    def schema(self) -> Mapping[str, object]:
        return {"type": "function", "function": {"name": self.name}}

    async def call(self, arguments: Mapping[str, object]) -> str:
        raise RuntimeError("the tool's own bug")


class Silent(Broken):
    name = "silent"

    async def call(self, arguments: Mapping[str, object]) -> str:
        raise RuntimeError


class Stuck(Broken):
    name = "stuck"
    timeout = 0.05

    async def call(self, arguments: Mapping[str, object]) -> str:
        await asyncio.Event().wait()
        return "never"


class Echo(Tool):
    name = "echo"

    @property
    def schema(self) -> Mapping[str, object]:
        types = {"text": "string", "count": "integer", "list": "array", "either": ["string", "null"]}
        properties = {name: {"type": type_name} for name, type_name in types.items()}
        return {
            "type": "function",
            "function": {"name": self.name, "parameters": {"type": "object", "properties": properties}},
        }

    async def call(self, arguments: Mapping[str, object]) -> str:
        return repr(dict(arguments))


TOOLS: dict[str, Tool] = {tool.name: tool for tool in (Calculator(), Broken(), Silent(), Stuck(), Echo())}


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [({"text": "12", "count": "12"}, {"text": "12", "count": 12}), ({"list": "[1, 2]"}, {"list": [1, 2]}),
     ({"count": "a dozen"}, {"count": "a dozen"}), ({"either": "12"}, {"either": "12"}),
     ({"other": "1"}, {"other": "1"})],
)  # fmt: skip
async def test_arguments_that_were_written_as_text_get_the_schemas_types(
    arguments: Mapping[str, object], taken: Mapping[str, object]
) -> None:
    answer = await answer_tool_call(ToolCall("echo", arguments, typed=False), TOOLS)
    assert answer.text == repr(taken)
    answer = await answer_tool_call(ToolCall("echo", arguments), TOOLS)
    assert answer.text == repr(arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [(ToolCall("broken", {}), "the tool's own bug"), (ToolCall("silent", {}), "RuntimeError"),
     (ToolCall("stuck", {}), "no answer after 0.05 s"), (ToolCall("oven", {}), "no tool is called 'oven'"),
     (BadToolCall("not JSON"), "not JSON"), (ToolCall("calculator", {}), "expression"),
     (ToolCall("calculator", {"expression": 4}), "expression"),
     (ToolCall("calculator", {"expression": "1/0"}), "division by zero")],
)  # fmt: skip
async def test_every_failure_is_an_answer(call: ToolCall | BadToolCall, words: str) -> None:
    answer = await answer_tool_call(call, TOOLS)
    assert answer.failed
    assert answer.text.startswith("Error: ")
    assert words in answer.text


async def test_a_good_call() -> None:
    answer = await answer_tool_call(ToolCall("calculator", {"expression": "12 * 7"}), TOOLS)
    assert (answer.tool, answer.text, answer.failed) == ("calculator", "84", False)


async def test_cancelling_a_sample_cancels_its_tool() -> None:
    task = asyncio.create_task(answer_tool_call(ToolCall("stuck", {}), TOOLS))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
