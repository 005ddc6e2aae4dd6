"""OpenAI's client: chat completions and responses."""

import json
from typing import Any

from openai import OpenAI

from tests.gateway.sdks.task import QUESTION, SCHEMAS, TOOLS, Site, main


def client(site: Site) -> OpenAI:
    return OpenAI(base_url=f"{site.url}/v1", api_key=site.key)


def play(site: Site) -> str:
    return chat(site) if site.protocol == "chat" else responses(site)


def chat(site: Site) -> str:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
    ]
    while True:
        asked: Any = {"model": "policy", "messages": messages, "tools": tools}
        if site.streamed:
            with client(site).chat.completions.stream(**asked) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client(site).chat.completions.create(**asked).choices[0].message
        messages.append(message.to_dict())
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            answer = TOOLS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})


def responses(site: Site) -> str:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    tools: Any = [{"type": "function", "name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
    while True:
        asked: Any = {"model": "policy", "input": items, "tools": tools, "store": False}
        if site.streamed:
            with client(site).responses.stream(**asked) as events:
                response = events.get_final_response()
        else:
            response = client(site).responses.create(**asked)
        items += [item.to_dict() for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        for call in calls:
            answer = TOOLS[call.name](**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": answer})


def ask(site: Site) -> tuple[int, int]:
    if site.protocol == "chat":
        messages: Any = [{"role": "user", "content": QUESTION}]
        usage = client(site).chat.completions.create(model="policy", messages=messages, max_tokens=8).usage
        return usage.prompt_tokens, usage.completion_tokens
    used = client(site).responses.create(model="policy", input=QUESTION, max_output_tokens=8).usage
    return used.input_tokens, used.output_tokens


if __name__ == "__main__":
    main(play, ask)
