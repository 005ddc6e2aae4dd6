"""Tools that the model may call between its turns: the interface, a calculator, and parsing of `<tool_call>` formats.

If a call fails (bad JSON, no such tool, a tool that raises or takes too long), the tool answer says so. The model may
try again, and the sample continues.
"""

import ast
import asyncio
import math
import operator
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import orjson

from millrace.errors import MillraceError
from millrace.rollout.sample import Message
from millrace.tracing import span

_TOOL_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^<>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PYTHON: Mapping[str, object] = {"True": True, "False": False, "None": None}  # as some chat templates write them
_LONGEST_EXPRESSION = 500  # characters
_LARGEST_EXPONENT = 1000
_LARGEST_RESULT_BITS = 4096

Number = int | float


class ToolError(MillraceError):
    """A tool can't do what the model asked for. The model gets the message as the tool's answer."""


class Tool(ABC):
    """A function that the model can call.

    Each episode has an instance of its own, so it may keep state between the calls of one episode.

    >>> class Counter(Tool):
    ...     name = "count"
    ...     schema = {"type": "function", "function": {"name": "count", "description": "Counts its calls."}}
    ...     calls = 0
    ...
    ...     async def call(self, arguments):
    ...         self.calls += 1
    ...         return str(self.calls)

    timeout: seconds for each call.
    """

    name: str
    timeout: float = 30.0

    @property
    @abstractmethod
    def schema(self) -> Mapping[str, object]:
        """The JSON schema of the function, in the form that chat templates take as `tools`."""

    @abstractmethod
    async def call(self, arguments: Mapping[str, object]) -> str:
        """Return the answer as text. Raises ToolError for a mistake of the model. The caller sets the deadline."""

    async def close(self) -> None:  # noqa: B027 (most tools have nothing to close)
        """End what the tool has started. It is called at the end of the episode, however that ends."""


class Calculator(Tool):
    """Evaluates one arithmetic expression over numbers with + - * / // % ** and parentheses."""

    name = "calculator"

    @property
    def schema(self) -> Mapping[str, object]:
        expression = {"type": "string", "description": "numbers, + - * / // % ** and parentheses"}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": "Evaluates an arithmetic expression.",
                "parameters": {"type": "object", "properties": {"expression": expression}, "required": ["expression"]},
            },
        }

    async def call(self, arguments: Mapping[str, object]) -> str:
        match arguments.get("expression"):
            case str(expression):
                return format_number(evaluate(expression))
            case _:
                raise ToolError('the calculator takes one argument: "expression", a string')


BUILT_IN: Mapping[str, type[Tool]] = {tool.name: tool for tool in (Calculator,)}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the model. typed: False if all arguments are text, so that the tool's schema gives their types."""

    name: str
    arguments: Mapping[str, object]
    typed: bool = True


@dataclass(frozen=True, slots=True)
class BadToolCall:
    """A tool call that can't be parsed. The model gets `reason` as the answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """The answer to a tool call, which the model reads. `tool` is None if the call could not be parsed. `seconds`: how
    long it took."""

    tool: str | None
    text: str
    failed: bool
    seconds: float = field(default=0.0, compare=False)

    @property
    def message(self) -> Message:
        """The answer as a chat message. That of a failed call has `error`, which chat templates don't get to see."""
        name = {} if self.tool is None else {"name": self.tool}
        return {"role": "tool", "content": self.text, **name, **({"error": True} if self.failed else {})}


def parse_tool_calls(text: str) -> tuple[ToolCall | BadToolCall, ...]:
    """Return the tool calls in the text of a turn, in order; empty if there is no `<tool_call>`.

    text: without reasoning. Two forms are parsed: JSON (Qwen2.5 and 3) and `<function=NAME><parameter=NAME>`
    (Qwen3-Coder, Qwen3.5, Nemotron 3).
    """
    return tuple(_parse_tool_call(body, closing) for body, closing in _TOOL_CALL.findall(text))


def without_tool_calls(text: str) -> str:
    """Return the text of a turn without its tool calls. Those that can't be parsed stay."""

    def kept(match: re.Match[str]) -> str:
        return match[0] if isinstance(_parse_tool_call(match[1], match[2]), BadToolCall) else ""

    return _TOOL_CALL.sub(kept, text).strip()


async def answer_tool_call(call: ToolCall | BadToolCall, tools: Mapping[str, Tool]) -> ToolAnswer:
    """Run one call within the tool's timeout. Raises nothing: every failure becomes an answer for the model."""
    started = time.monotonic()
    answer = await _answer(call, tools)
    return replace(answer, seconds=time.monotonic() - started)


async def _answer(call: ToolCall | BadToolCall, tools: Mapping[str, Tool]) -> ToolAnswer:
    if isinstance(call, BadToolCall):
        return ToolAnswer(None, f"Error: {call.reason}", failed=True)
    tool = tools.get(call.name)
    if tool is None:
        names = ", ".join(tools) or "none"
        return ToolAnswer(call.name, f"Error: no tool is called {call.name!r}; there are: {names}", failed=True)
    timeout = asyncio.timeout(tool.timeout)
    try:
        async with timeout:
            with span("tool", {"millrace.tool": call.name}):
                return ToolAnswer(call.name, await tool.call(typed(call, tool.schema).arguments), failed=False)
    # A tool is the user's code and may raise anything. One bad call must not end the other samples of the batch.
    except Exception as error:
        reason = f"no answer after {tool.timeout:g} s" if timeout.expired() else f"{error}" or type(error).__name__
        return ToolAnswer(call.name, f"Error: {reason}", failed=True)


def evaluate(expression: str) -> Number:
    """Return the value of an arithmetic expression.

    The expression is parsed, not executed: it can contain numbers and operators only. Raises ToolError for anything
    else, and if the value is too large to print.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise ToolError(f"the expression has {len(expression)} characters; at most {_LONGEST_EXPRESSION} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # for texts such as `12x`; the error below is enough
            tree = ast.parse(_THOUSANDS_SEPARATOR.sub("", expression).strip(), mode="eval")
        value = _evaluate(tree.body)
    except SyntaxError as error:
        raise ToolError(f"not an arithmetic expression: {expression}") from error
    except ZeroDivisionError as error:
        raise ToolError(f"division by zero: {expression}") from error
    except (OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise ToolError(f"can't be evaluated: {expression}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError(f"the result is too large: {expression}")
    return value


def format_number(value: Number) -> str:
    """Return a number as text: integers in full, others with up to ten significant digits."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"


def _parse_tool_call(body: str, closing: str) -> ToolCall | BadToolCall:
    if not closing:
        return BadToolCall("the tool call has no </tool_call>")
    if body.lstrip().startswith("<function="):
        if (function := _FUNCTION.fullmatch(body)) is None:
            return BadToolCall("a tool call is <function=NAME> with <parameter=NAME>value</parameter> and </function>")
        return ToolCall(function[1], dict(_PARAMETER.findall(function[2])), typed=False)
    try:
        call = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return BadToolCall(f"the tool call is not JSON: {error}")
    match call:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments)
        case _:
            return BadToolCall('a tool call is {"name": a string, "arguments": an object}')


def typed(call: ToolCall, schema: Mapping[str, object]) -> ToolCall:
    """Return a call with the schema's types for arguments that the model wrote as text. Other text stays text."""
    match schema:
        case {"function": {"parameters": {"properties": dict(properties)}}} if not call.typed:
            values = {name: _value(str(text), properties.get(name)) for name, text in call.arguments.items()}
            return ToolCall(call.name, values)
        case _:
            return call


def _value(text: str, schema: object) -> object:
    match schema:
        case {"type": "string"} | {"type": ["string", *_]} | None:
            return text
        case _:
            try:
                return orjson.loads(text)
            except orjson.JSONDecodeError:
                return _PYTHON.get(text, text)


def _evaluate(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_operator(op)(_evaluate(left), _evaluate(right)))
        case _:
            raise ToolError("only numbers, + - * / // % ** and parentheses can be used")


def _operator(op: ast.operator) -> Callable[[Number, Number], Number]:
    known: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Pow: _power,
    }
    if type(op) not in known:
        raise ToolError("only + - * / // % ** are known")
    return known[type(op)]


def _power(base: Number, exponent: Number) -> Number:
    """Return `base ** exponent`. Raises ToolError before computing a result that would be too large."""
    if abs(exponent) > _LARGEST_EXPONENT:
        raise ToolError(f"the exponent {exponent} is too large")
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _LARGEST_RESULT_BITS:
        raise ToolError("the result is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ToolError("the result is not a real number")
    return float(result) if isinstance(result, float) else int(result)


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > _LARGEST_RESULT_BITS:
        raise ToolError("the result is too large")
    return value
