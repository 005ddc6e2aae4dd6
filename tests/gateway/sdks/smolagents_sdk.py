"""smolagents, whose agent writes its calls and their answers into the conversation as text."""

import contextlib
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool

from tests.gateway.sdks.task import QUESTION, Site, clock, main, weather


def model(site: Site, **more: int) -> OpenAIModel:
    return OpenAIModel("policy", api_base=f"{site.url}/v1", api_key=site.key, **more)


def play(site: Site) -> str:
    agent = ToolCallingAgent([tool(weather), tool(clock)], model(site), stream_outputs=site.streamed)
    with contextlib.redirect_stdout(sys.stderr):
        return str(agent.run(QUESTION))


def ask(site: Site) -> tuple[int, int]:
    message = model(site, max_tokens=8).generate([{"role": "user", "content": QUESTION}])
    return message.token_usage.input_tokens, message.token_usage.output_tokens


if __name__ == "__main__":
    main(play, ask)
