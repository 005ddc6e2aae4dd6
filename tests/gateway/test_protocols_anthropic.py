"""Anthropic's messages: what is read of requests, as Claude Code and the SDK send them, and the events of an answer."""

import base64
from typing import Any

import anthropic
import pytest

from millrace.gateway.answer import Alternative, Answer, Finish
from millrace.gateway.call import Choice, TurnText
from millrace.gateway.protocols.anthropic import AnthropicMessages
from millrace.gateway.protocols.base import ContextFull, RequestError
from tests.gateway.sdk import (
    TWO_CALLS,
    USAGE,
    Endpoint,
    alternative,
    anthropic_client,
    assert_replayed,
    events_of,
    sent_events,
)

PROTOCOL = AnthropicMessages()
USER: Any = {"role": "user", "content": "run it"}
BASH: Any = {
    "name": "Bash", "description": "Runs a command.",
    "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}  # fmt: skip
PNG = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"PNG").decode()}

# As Claude Code 2.1.197 sends it in the middle of a conversation, with shorter texts.
CLAUDE_CODE: Any = {
    "model": "claude-opus-4-8",
    "max_tokens": 64000,
    "stream": True,
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": '{"device_id":"ebf7","session_id":"c0d79443"}'},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.ec6; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are a Claude agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "\nUse the tools.", "cache_control": {"type": "ephemeral"}},
    ],
    "tools": [
        {**BASH, "cache_control": {"type": "ephemeral"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>skills</system-reminder>"},
            {"type": "text", "text": "run things", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Available agent types: none"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I run both.\n", "signature": "sig"},
            {"type": "text", "text": "  Let me run it.\n\n"},
            {"type": "tool_use", "id": "call_1", "name": "Bash", "input": {"command": "echo 1", "timeout": 5000}},
            {"type": "tool_use", "id": "call_2", "name": "Bash", "input": {"command": "false"}}]},
        {"role": "user", "content": [
            {"tool_use_id": "call_2", "type": "tool_result", "content": "Exit code 1", "is_error": True},
            {"tool_use_id": "call_1", "type": "tool_result", "content": [{"type": "text", "text": "1"}],
             "is_error": False, "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "<system-reminder>be quick</system-reminder>"}]},
    ],
}  # fmt: skip


def test_claude_code() -> None:
    call = PROTOCOL.read(CLAUDE_CODE, {"x-claude-code-agent-id": "agent-1"})
    system, user, late, turn, *rest = call.messages
    assert system == {"role": "system", "content": "You are a Claude agent.\n\n\nUse the tools."}
    assert user["content"] == "<system-reminder>skills</system-reminder>\nrun things"
    assert late == {"role": "system", "content": "Available agent types: none"}
    assert (turn["content"], turn["reasoning"]) == ("  Let me run it.\n\n", "I run both.\n")
    assert [one["function"]["arguments"] for one in turn["tool_calls"]] == [  # type: ignore[attr-defined]
        '{"command":"echo 1","timeout":5000}',
        '{"command":"false"}',
    ]
    assert rest == [
        {"role": "tool", "content": "Error: Exit code 1", "tool_call_id": "call_2"},
        {"role": "tool", "content": "1", "tool_call_id": "call_1"},
        {"role": "user", "content": "<system-reminder>be quick</system-reminder>"},
    ]
    assert [tool["function"]["name"] for tool in call.tools] == ["Bash"]  # type: ignore[index]
    assert call.dropped == ("context_management", "output_config.effort", "tool:web_search_20250305")
    assert (call.stream, call.reasoning, call.model) == (True, True, "claude-opus-4-8")
    assert call.lineage.agent == "agent-1"


def test_cache_control_makes_no_difference() -> None:
    marked = {"role": "user", "content": [{"type": "text", "text": "run it", "cache_control": {"type": "ephemeral"}}]}
    assert PROTOCOL.read({"messages": [marked]}, {}).identity == PROTOCOL.read({"messages": [USER]}, {}).identity


def test_settings() -> None:
    call = PROTOCOL.read(
        {
            "messages": [USER], "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "tools": [BASH],
            "stop_sequences": ["END"], "output_format": {"type": "json_schema", "schema": {"type": "object"}},
            "tool_choice": {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True},
        },
        {},
    )  # fmt: skip
    wanted = call.wanted
    assert (wanted.max_tokens, wanted.temperature, wanted.top_p, wanted.top_k, wanted.stop) == (
        9,
        0.5,
        0.9,
        4,
        ("END",),
    )
    assert call.choice == Choice(required=True, name="Bash", parallel=False)
    assert (call.schema, call.reasoning, call.dropped) == ({"type": "object"}, False, ())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, Choice()),
        ({"type": "auto"}, Choice()),
        ({"type": "auto", "disable_parallel_tool_use": True}, Choice(parallel=False)),
        ({"type": "any"}, Choice(required=True)),
        ({"type": "none"}, Choice(allowed=False)),
    ],
)
def test_tool_choice(choice: Any, expected: Choice) -> None:
    assert PROTOCOL.read({"messages": [USER], "tools": [BASH], "tool_choice": choice}, {}).choice == expected


def test_title_request_of_claude_code_has_a_schema() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    output = {"format": {"type": "json_schema", "schema": schema}}
    assert PROTOCOL.read({"messages": [USER], "output_config": output}, {}).schema == schema


def test_images_of_users_and_tools() -> None:
    use = {"type": "tool_use", "id": "call_1", "name": "Read", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "image", "source": PNG}]}
    shown = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "source": PNG}]}
    messages = [shown, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    image = {"type": "image", "image": b"PNG"}
    user, _, tool = PROTOCOL.read({"messages": messages}, {}).messages
    assert user["content"] == [{"type": "text", "text": "see"}, image]
    assert tool == {"role": "tool", "content": [image], "tool_call_id": "call_1"}


def test_redacted_thinking_is_left_out_and_named() -> None:
    turn = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]}
    call = PROTOCOL.read({"messages": [USER, turn, USER]}, {})
    assert call.messages[1] == {"role": "assistant", "content": "a"}
    assert call.dropped == ("content:redacted_thinking",)


def test_turn_in_two_messages_is_one_turn() -> None:
    parts = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    messages = PROTOCOL.read({"messages": [USER, *parts, USER]}, {}).messages
    assert messages[1:2] == ({"role": "assistant", "content": "ab"},)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "The answer is ("}]}, "last message is the assistant's"),
        ({"messages": []}, "has no messages"),
        ({"messages": "hello"}, "messages is a list"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "'critic' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document' is not"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "'server_tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}]},
         "downloads none"),
        ({"messages": [USER], "tool_choice": {"type": "any"}}, "has no functions"),
        ({"messages": [USER], "tool_choice": {"type": "many"}}, "tool_choice is of the type"),
        ({"messages": [USER], "tools": [{"name": "Bash"}]}, "needs a name and an input_schema"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens is a positive integer"),
        ({"messages": [USER], "stop_sequences": [1]}, "stop texts are a list of texts"),
        ({"messages": [USER], "output_format": {"type": "xml"}}, "the format of the output is json_schema"),
    ],
)  # fmt: skip
def test_refused(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        PROTOCOL.read(body, {})
    assert error.value.status == 400


def test_order_of_the_events() -> None:
    call = PROTOCOL.read({**CLAUDE_CODE}, {})
    events = sent_events(
        b"".join(events_of(PROTOCOL, call, Answer("a1", "m", 1, (alternative(TWO_CALLS),), USAGE), piece=99))
    )
    text = ["content_block_start", "content_block_delta", "content_block_stop"]
    thinking = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    expected = ["message_start", "ping", *thinking, *text, *text, *text, "message_delta", "message_stop"]
    assert [name for name, _ in events] == expected
    assert [data["type"] for _, data in events] == expected
    assert [data["index"] for _, data in events if "index" in data] == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 3
    kinds = [data["delta"]["type"] for name, data in events if name == "content_block_delta"]  # type: ignore[index]
    assert kinds == ["thinking_delta", "signature_delta", "text_delta", "input_json_delta", "input_json_delta"]
    start: Any = events[0][1]["message"]
    assert (start["id"], start["model"], start["content"]) == ("msg_a1", "claude-opus-4-8", [])


def test_sdk_gets_the_same_from_a_stream_as_from_a_body() -> None:
    endpoint = Endpoint(PROTOCOL)
    client = anthropic_client(endpoint)
    endpoint.will_say(TWO_CALLS, TWO_CALLS)
    asked: Any = {"model": "m", "max_tokens": 99, "messages": [USER], "thinking": {"type": "adaptive"}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        streamed = events.get_final_message()
    assert [one.to_dict() for one in streamed.content] == [one.to_dict() for one in whole.content]
    assert [one.type for one in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.content[2].input == {"city": "Zürich", "days": 2.0}
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence, message.model) == ("tool_use", None, "m")
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (60, 40, 20)


@pytest.mark.parametrize("stream", [False, True])
def test_agent_that_asks_for_no_thinking_gets_none(stream: bool) -> None:
    """Many such agents take the first block as the answer."""
    endpoint = Endpoint(PROTOCOL)
    turn = TurnText("thoughts", "said")
    endpoint.will_say(turn, TurnText("", "done"))
    client = anthropic_client(endpoint)
    messages = [USER]
    for _ in range(2):
        if stream:
            with client.messages.stream(model="m", max_tokens=99, messages=messages) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(model="m", max_tokens=99, messages=messages)
        assert [one.type for one in message.content] == ["text"]
        messages = [*messages, {"role": "assistant", "content": message.content[0].text}, USER]
    before, after = endpoint.calls
    assert_replayed(before, turn, after, reasoning=False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("one", "reason", "sequence"),
    [
        (Alternative(TurnText("", "said"), Finish.STOP), "end_turn", None),
        (Alternative(TurnText("", "said"), Finish.STOP_TEXT, "END"), "stop_sequence", "END"),
        (Alternative(TurnText("", ""), Finish.LENGTH), "max_tokens", None),
    ],
)
def test_why_an_answer_ended(one: Alternative, reason: str, sequence: str | None, stream: bool) -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.append(one)
    client = anthropic_client(endpoint)
    asked: Any = {"model": "m", "max_tokens": 99, "messages": [USER]}
    if stream:
        with client.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert message.content[0].text == one.turn.content


def test_errors() -> None:
    client = anthropic_client(Endpoint(PROTOCOL))
    with pytest.raises(anthropic.BadRequestError, match="the last message is the assistant's"):
        client.messages.create(model="m", max_tokens=9, messages=[USER, {"role": "assistant", "content": "I"}])
    assert PROTOCOL.error(ContextFull(210000, 200000)) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"},
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (409, "invalid_request_error"), (413, "request_too_large"),
        (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error"), (504, "timeout_error"),
    ],
)  # fmt: skip
def test_type_of_an_error(status: int, kind: str) -> None:
    body: Any = PROTOCOL.error(RequestError("why", status=status))
    assert body["error"] == {"type": kind, "message": "why"}
    stream = PROTOCOL.stream(PROTOCOL.read({"messages": [USER]}, {}), "m")
    assert sent_events(stream.error(RequestError("why", status=status))) == [("error", body)]


def test_count_of_tokens_also_counts_a_turn_at_the_end() -> None:
    call = PROTOCOL.read_prompt({"messages": [USER, {"role": "assistant", "content": "The"}], "tools": [BASH]}, {})
    assert [message["role"] for message in call.messages] == ["user", "assistant"]
    assert PROTOCOL.counted(12) == {"input_tokens": 12}
