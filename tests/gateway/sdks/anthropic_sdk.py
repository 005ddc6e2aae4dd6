"""Anthropic's client."""

from typing import Any

from anthropic import Anthropic

from tests.gateway.sdks.task import QUESTION, SCHEMAS, TOOLS, Site, main


def client(site: Site) -> Anthropic:
    return Anthropic(base_url=site.url, api_key=site.key)


def play(site: Site) -> str:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    tools = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    while True:
        asked: Any = {"model": "policy", "max_tokens": 500, "messages": messages, "tools": tools}
        if site.streamed:
            with client(site).messages.stream(**asked, thinking={"type": "adaptive"}) as events:
                message = events.get_final_message()
        else:
            message = client(site).messages.create(**asked)
        messages.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
        calls = [block for block in message.content if block.type == "tool_use"]
        if not calls:
            return "".join(block.text for block in message.content if block.type == "text")
        answers = [
            {"type": "tool_result", "tool_use_id": call.id, "content": TOOLS[call.name](**call.input)} for call in calls
        ]
        messages.append({"role": "user", "content": answers})


def ask(site: Site) -> tuple[int, int]:
    messages: Any = [{"role": "user", "content": QUESTION}]
    usage = client(site).messages.create(model="policy", messages=messages, max_tokens=8).usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens


if __name__ == "__main__":
    main(play, ask)
