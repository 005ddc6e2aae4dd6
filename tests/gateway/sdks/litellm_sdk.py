"""litellm, by chat completions and by Anthropic's messages."""

import json
from typing import Any

import litellm

from tests.gateway.sdks.task import QUESTION, SCHEMAS, TOOLS, Site, main


def complete(site: Site, messages: list[Any], **more: Any) -> Any:
    chat = site.protocol == "chat"
    where = {"api_base": f"{site.url}/v1" if chat else site.url, "api_key": site.key}
    name = "openai/policy" if chat else "anthropic/policy"
    if not site.streamed:
        return litellm.completion(model=name, messages=messages, **where, **more)
    chunks = list(litellm.completion(model=name, messages=messages, stream=True, **where, **more))
    return litellm.stream_chunk_builder(chunks, messages=messages)


def play(site: Site) -> str:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    tools = [{"type": "function", "function": {"name": name, "parameters": made}} for name, made in SCHEMAS.items()]
    while True:
        message = complete(site, messages, tools=tools).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return str(message.content)
        for call in message.tool_calls:
            answer = TOOLS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})


def ask(site: Site) -> tuple[int, int]:
    usage = complete(site, [{"role": "user", "content": QUESTION}], max_tokens=8).usage
    return usage.prompt_tokens, usage.completion_tokens


if __name__ == "__main__":
    main(play, ask)
