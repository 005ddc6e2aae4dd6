"""pydantic-ai, by chat completions, responses, and Anthropic's messages."""

from collections.abc import AsyncIterable
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from tests.gateway.sdks.task import QUESTION, Site, clock, main, weather


def model(site: Site) -> Any:
    if site.protocol == "messages":
        return AnthropicModel("policy", provider=AnthropicProvider(base_url=site.url, api_key=site.key))
    kind = OpenAIChatModel if site.protocol == "chat" else OpenAIResponsesModel
    return kind("policy", provider=OpenAIProvider(base_url=f"{site.url}/v1", api_key=site.key))


def play(site: Site) -> str:
    agent = Agent(model(site), tools=[weather, clock])
    return str(agent.run_sync(QUESTION, event_stream_handler=read if site.streamed else None).output)


async def read(_: Any, events: AsyncIterable[Any]) -> None:
    """Reads the events of a stream: with a reader, the agent asks for streams."""
    async for _ in events:
        pass


def ask(site: Site) -> tuple[int, int]:
    usage: Any = Agent(model(site), model_settings={"max_tokens": 8}).run_sync(QUESTION).usage
    found = usage() if callable(usage) else usage
    return found.input_tokens, found.output_tokens


if __name__ == "__main__":
    main(play, ask)
