"""The package `openai-agents`, by chat completions and by responses."""

import asyncio
from typing import Any

from openai import AsyncOpenAI

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from tests.gateway.sdks.task import QUESTION, Site, clock, main, weather


async def run(site: Site, tools: list[Any], settings: ModelSettings) -> Any:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{site.url}/v1", api_key=site.key)
    kind = OpenAIChatCompletionsModel if site.protocol == "chat" else OpenAIResponsesModel
    agent = Agent(name="Helper", tools=tools, model=kind("policy", client), model_settings=settings)
    if not site.streamed:
        return await Runner.run(agent, QUESTION)
    result = Runner.run_streamed(agent, QUESTION)
    async for _ in result.stream_events():
        pass
    return result


def play(site: Site) -> str:
    result = asyncio.run(run(site, [function_tool(weather), function_tool(clock)], ModelSettings()))
    return str(result.final_output)


def ask(site: Site) -> tuple[int, int]:
    usage = asyncio.run(run(site, [], ModelSettings(max_tokens=8))).context_wrapper.usage
    return usage.input_tokens, usage.output_tokens


if __name__ == "__main__":
    main(play, ask)
