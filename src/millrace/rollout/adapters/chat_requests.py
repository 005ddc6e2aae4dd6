"""OpenAI's chat completions from the server's side, for agents that ask a sample for its turns. Pure."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from millrace.errors import UserCodeError
from millrace.rollout.sample import Message
from millrace.rollout.step import Action
from millrace.rollout.tools import without_tool_calls

# Agents read this as the end of the context, and end with the conversation that they have.
CONTEXT_FULL = {
    "error": {
        "message": "This model's maximum context length is reached.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}


def messages_of(body: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a request, with their text and the names of tools. Raises UserCodeError for images."""
    return [_message(message) for message in body["messages"]]


def tools_of(body: Mapping[str, Any]) -> tuple[Mapping[str, object], ...]:
    """Return the JSON schemas of the tools in a request."""
    return tuple(body.get("tools") or ())


def continuation(before: Sequence[Message], after: Sequence[Message]) -> list[Message]:
    """Return what follows the model's turn, which follows `before`, in a later request.

    Raises UserCodeError if the request is no continuation: what was sampled can't be changed afterwards.
    """
    turn = len(before)
    if list(after[:turn]) != list(before) or len(after) < turn + 2 or after[turn]["role"] != "assistant":
        raise UserCodeError(
            "a request does not continue the conversation before it; a harness that shortens or branches "
            "conversations can't be played, nor several agents with the policy's model"
        )
    return list(after[turn + 1 :])


def answer(action: Action, turn: int) -> dict[str, Any]:
    """Return a turn of the model as a chat completion. `turn` numbers the tool calls."""
    calls = [
        {
            "id": f"call_{turn}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": orjson.dumps(call.arguments).decode()},
        }
        for number, call in enumerate(action.tool_calls)
    ]
    text = without_tool_calls(action.text) if calls else action.text
    message = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
    reason = "tool_calls" if calls else "length" if action.cut else "stop"
    return _head("chat.completion", turn) | {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def streamed(whole: Mapping[str, Any]) -> bytes:
    """Return a chat completion as the server-sent events of a stream."""
    [choice] = whole["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(delta["tool_calls"])]
    ends = [(delta, None), ({}, choice["finish_reason"])]
    events = [
        {
            **whole,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": part, "finish_reason": reason}],
        }
        for part, reason in ends
    ]
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def _head(kind: str, turn: int) -> dict[str, Any]:
    return {"id": f"turn-{turn}", "object": kind, "created": int(time.time()), "model": "policy"}


def _message(message: Mapping[str, Any]) -> Message:
    match message.get("content"):
        case None:
            text = ""
        case str(text):
            pass
        case [*parts] if all(part.get("type") == "text" for part in parts):
            text = "".join(part["text"] for part in parts)
        case _:
            raise UserCodeError("a message has content that is no text, such as an image, which can't be played")
    kept: dict[str, object] = {"role": message["role"], "content": text}
    if kept["role"] == "assistant":  # the harness may write a turn of the model in other words
        return kept if "tool_calls" not in message else kept | {"content": ""}
    return kept | ({"name": message["name"]} if message.get("name") else {})
