"""Tools of your own: a function, and a class that keeps state for one episode."""

import operator
import re
from collections.abc import Mapping
from fractions import Fraction

from millrace.rollout import Tool, ToolError

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def calculator(expression: str) -> str:
    """Evaluates two numbers and an operator, exactly.

    Args:
        expression: such as 12 * 7
    """
    match = re.fullmatch(r"\s*(-?\d+)\s*([-+*/])\s*(-?\d+)\s*", expression)
    if match is None:
        raise ToolError("write two numbers with + - * or / between them")  # the model reads this
    return str(OPERATORS[match[2]](Fraction(match[1]), Fraction(match[3])))


class Notes(Tool):
    """Keeps the notes of one conversation: each episode has an instance of its own."""

    name = "note"
    schema = {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Keeps a text and returns all texts so far.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    }

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def call(self, arguments: Mapping[str, object]) -> str:
        self.texts.append(str(arguments.get("text", "")))
        return "\n".join(self.texts)

    async def close(self) -> None:
        self.texts.clear()
