"""A tool for verl's agent loop, and a parser that finds a call of it in whatever an untrained model says."""

from typing import Any

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool


@function_tool  # type: ignore[untyped-decorator]  # verl comes without types
def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return str(a + b)


@ToolParser.register("always")
class AlwaysParser(ToolParser):  # type: ignore[misc]  # verl comes without types
    """Every turn of the model calls the tool."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        return text, [FunctionCall(name="add", arguments='{"a": 2, "b": 3}')]
