"""An agent on the `openai` package that solves word problems with a calculator. It knows nothing of Millrace."""

import asyncio
import json
import operator
import os

from openai import AsyncOpenAI

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
CALCULATOR = {"name": "calculator", "description": "Evaluates `a + b`.", "parameters": EXPRESSION}
CLIENT = AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "the episode's"))


def calculate(arguments: str) -> str:
    try:
        left, sign, right = json.loads(arguments)["expression"].split()
        return f"{OPERATORS[sign](float(left), float(right)):g}"
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"Error: {error}"


async def solve(prompt: str, base_url: str | None = None, api_key: str | None = None) -> str | None:
    model, messages = CLIENT.with_options(base_url=base_url, api_key=api_key), [{"role": "user", "content": prompt}]
    while True:
        answer = await model.chat.completions.create(
            model="policy", messages=messages, tools=[{"type": "function", "function": CALCULATOR}]
        )
        turn = answer.choices[0].message
        messages.append(turn.model_dump(exclude_none=True))
        if not turn.tool_calls:
            return turn.content
        for call in turn.tool_calls:
            result = calculate(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    print(asyncio.run(solve(os.environ["MILLRACE_PROMPT"])))
