"""OpenAI's chat completions: what is read of requests, as agents send them, and the chunks of an answer."""

from typing import Any

import openai
import pytest

from millrace.gateway.answer import Finish
from millrace.gateway.call import Choice, TurnText
from millrace.gateway.protocols.base import ContextFull, RequestError
from millrace.gateway.protocols.chat import ChatCompletions
from tests.gateway.sdk import TWO_CALLS, Endpoint, alternative, logged, openai_client

PROTOCOL = ChatCompletions()
USER: Any = {"role": "user", "content": "run it"}
SHELL: Any = {
    "type": "function",
    "function": {"name": "shell", "description": "Runs a command.", "parameters": {"type": "object", "properties": {}}},
}

# As qwen-code sends it in the middle of a conversation, with shorter texts.
QWEN_CODE: Any = {
    "model": "qwen3-coder",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 8000,
    "metadata": {"sessionId": "1", "promptId": "2"},
    "tools": [SHELL],
    "messages": [
        {"role": "system", "content": "You are Qwen Code."},
        {"role": "user", "content": [{"type": "text", "text": "context"}, {"type": "text", "text": "run things"}]},
        {"role": "assistant", "content": None, "reasoning_content": "I run it.", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "shell", "arguments": '{"command": "ls"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "a.py"}]},
    ],
}  # fmt: skip


def test_qwen_code() -> None:
    call = PROTOCOL.read(QWEN_CODE, {})
    system, user, turn, tool = call.messages
    assert system == {"role": "system", "content": "You are Qwen Code."}
    assert user == {"role": "user", "content": "context\nrun things"}
    assert (turn["content"], turn["reasoning"], len(turn["tool_calls"])) == ("", "I run it.", 1)  # type: ignore[arg-type]
    assert tool == {"role": "tool", "content": "a.py", "tool_call_id": "call_1"}
    assert (call.tools, call.stream, call.stream_usage, call.dropped) == ((SHELL,), True, True, ())


def test_settings() -> None:
    call = PROTOCOL.read(
        {
            "messages": [USER], "max_tokens": 5, "max_completion_tokens": 7, "n": 2, "stop": ["a", "b"], "seed": 3,
            "logit_bias": {"5": -1}, "tools": [SHELL, {"type": "custom", "custom": {"name": "x"}}],
            "tool_choice": {"type": "function", "function": {"name": "shell"}}, "parallel_tool_calls": False,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
            "reasoning_effort": "high", "top_logprobs": 2, "user": "me",
        },
        {},
    )  # fmt: skip
    wanted = call.wanted
    assert (wanted.max_tokens, wanted.stop, wanted.seed, wanted.logit_bias) == (7, ("a", "b"), 3, {5: -1.0})
    assert call.choice == Choice(required=True, name="shell", parallel=False)
    assert (call.n, call.schema) == (2, {"type": "array"})
    assert call.dropped == ("reasoning_effort", "top_logprobs", "tool:custom")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "I be"}]}, "the last message is the assistant's"),
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "user"}]}, "'user' is not supported, or lacks a field"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio' is not supported"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "a function with a name"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools is a list"),
        ({"messages": [USER], "tools": [SHELL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"messages": [USER], "response_format": {"type": "xml"}}, "response_format is"),
        ({"messages": [USER], "logit_bias": {"a": 1}}, "logit_bias is"),
        ({"messages": [USER], "top_k": 1.5}, "top_k is an integer"),
        ({"messages": [USER], "seed": True}, "seed is an integer"),
    ],
)
def test_refused(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PROTOCOL.read(body, {})


def test_sdk_gets_the_same_from_a_stream_as_from_a_body() -> None:
    endpoint = Endpoint(PROTOCOL)
    client = openai_client(endpoint)
    endpoint.will_say(TWO_CALLS, TWO_CALLS)
    whole = client.chat.completions.create(model="m", messages=[USER])
    with client.chat.completions.stream(model="m", messages=[USER], stream_options={"include_usage": True}) as events:
        streamed = events.get_final_completion()
    for completion in (whole, streamed):
        (choice,) = completion.choices
        assert (choice.finish_reason, completion.model) == ("tool_calls", "m")
        assert (choice.message.content, choice.message.reasoning_content) == (TWO_CALLS.content, TWO_CALLS.reasoning)
        calls = [(one.id, one.function.name, one.function.arguments) for one in choice.message.tool_calls]
        assert calls == [(one.id, one.name, one.arguments) for one in TWO_CALLS.calls]
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (100, 20)


def test_alternatives_of_a_stream() -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.extend([alternative(TurnText("", "one")), alternative(TurnText("", "two"), Finish.LENGTH)])
    with openai_client(endpoint).chat.completions.stream(model="m", messages=[USER], n=2) as events:
        for _ in events:
            pass
        completion = events.current_completion_snapshot
    assert [(one.message.content, one.finish_reason) for one in completion.choices] == [
        ("one", "stop"),
        ("two", "length"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.append(logged(TurnText("", "Hi there"), ["Hi", " there"]))
    client = openai_client(endpoint)
    if stream:
        with client.chat.completions.stream(model="m", messages=[USER], logprobs=True) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(model="m", messages=[USER], logprobs=True).choices[0]
    assert [(one.token, round(one.logprob, 3)) for one in choice.logprobs.content] == [("Hi", -1.0), (" there", -0.1)]


def test_errors() -> None:
    with pytest.raises(openai.BadRequestError, match="has no messages"):
        openai_client(Endpoint(PROTOCOL)).chat.completions.create(model="m", messages=[])
    body: Any = PROTOCOL.error(ContextFull(300, 200))
    assert (body["error"]["type"], body["error"]["code"]) == ("invalid_request_error", "context_length_exceeded")
