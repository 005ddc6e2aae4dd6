"""The agent of openai_agent.py on the `openai-agents` package, which speaks OpenAI's responses."""

import asyncio
import operator
import os

from openai import AsyncOpenAI

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CLIENT = AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "the episode's"))
set_tracing_disabled(True)  # it would send traces to OpenAI


@function_tool
def calculator(expression: str) -> str:
    """Evaluates `a + b`."""
    left, sign, right = expression.split()
    return f"{OPERATORS[sign](float(left), float(right)):g}"


async def solve(prompt: str, base_url: str | None = None, api_key: str | None = None) -> str:
    model = OpenAIResponsesModel("policy", CLIENT.with_options(base_url=base_url, api_key=api_key))
    agent = Agent("solver", model=model, tools=[calculator])
    result = await Runner.run(agent, prompt)
    return str(result.final_output)


if __name__ == "__main__":
    print(asyncio.run(solve(os.environ["MILLRACE_PROMPT"])))
