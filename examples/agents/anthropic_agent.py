"""The agent of openai_agent.py on the `anthropic` package."""

import asyncio
import operator
import os

from anthropic import AsyncAnthropic

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
CALCULATOR = {"name": "calculator", "description": "Evaluates `a + b`.", "input_schema": EXPRESSION}
CLIENT = AsyncAnthropic(api_key=os.environ.get("ANTHROPIC_API_KEY", "the episode's"))


def calculate(arguments: dict) -> str:
    try:
        left, sign, right = arguments["expression"].split()
        return f"{OPERATORS[sign](float(left), float(right)):g}"
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"Error: {error}"


async def solve(prompt: str, base_url: str | None = None, api_key: str | None = None) -> str:
    model, messages = CLIENT.with_options(base_url=base_url, api_key=api_key), [{"role": "user", "content": prompt}]
    while True:
        turn = await model.messages.create(model="policy", max_tokens=1024, messages=messages, tools=[CALCULATOR])
        messages.append({"role": "assistant", "content": turn.content})
        calls = [block for block in turn.content if block.type == "tool_use"]
        if not calls:
            return "".join(block.text for block in turn.content if block.type == "text")
        results = [{"type": "tool_result", "tool_use_id": c.id, "content": calculate(c.input)} for c in calls]
        messages.append({"role": "user", "content": results})


if __name__ == "__main__":
    print(asyncio.run(solve(os.environ["MILLRACE_PROMPT"])))
