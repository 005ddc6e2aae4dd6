"""What an agent sends back of an answer, in each protocol: its part of the conversation, as it came."""

from collections.abc import Mapping
from typing import Any


def replayed_chat(answer: Mapping[str, Any]) -> list[Any]:
    return [answer["choices"][0]["message"]]


def replayed_responses(answer: Mapping[str, Any]) -> list[Any]:
    return list(answer["output"])


def replayed_anthropic(answer: Mapping[str, Any]) -> list[Any]:
    return [{"role": "assistant", "content": answer["content"]}]
