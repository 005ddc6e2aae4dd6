"""OpenAI's responses: what is read of requests, as Codex and the SDKs send them, and the events of an answer."""

import base64
from typing import Any

import openai
import pytest

from millrace.gateway.answer import Answer, Finish
from millrace.gateway.call import Choice, ToolUse, TurnText
from millrace.gateway.protocols.base import ContextFull, RequestError
from millrace.gateway.protocols.responses import Responses
from tests.gateway.sdk import (
    TWO_CALLS,
    USAGE,
    WEATHER,
    Endpoint,
    alternative,
    events_of,
    logged,
    openai_client,
    sent_events,
)

PROTOCOL = Responses()
USER: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "run it"}]}
SHELL: Any = {
    "type": "function", "name": "exec_command", "description": "Runs a command.", "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}  # fmt: skip

# As Codex 0.171 sends it in the middle of a conversation, with shorter texts.
CODEX: Any = {
    "model": "gpt-5.1-codex",
    "stream": True,
    "store": False,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"summary": "auto"},
    "prompt_cache_key": "01a22846-f0d7-7f80",
    "client_metadata": {"x-codex-installation-id": "f844d2b6"},
    "tools": [
        SHELL,
        {"type": "namespace", "name": "multi_agent_v1", "description": "Tools for agents.", "tools": [SHELL]},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "web_search", "external_web_access": False},
    ],
    "input": [
        {"type": "message", "id": "msg_1", "role": "developer", "content": [
            {"type": "input_text", "text": "You are a coding agent."}, {"type": "input_text", "text": "Be safe."}]},
        {"type": "message", "id": "msg_2", "role": "user", "content": [
            {"type": "input_text", "text": "<environment_context></environment_context>"}]},
        {"type": "message", "id": "msg_3", "role": "user", "content": [{"type": "input_text", "text": "run things"}]},
        {"type": "reasoning", "id": "rs_a1_0", "summary": [{"type": "summary_text", "text": "I run it.\n"}],
         "content": [{"type": "reasoning_text", "text": "I run it.\n"}], "encrypted_content": None},
        {"type": "message", "status": "completed", "id": "msg_a1_1", "role": "assistant", "content": [
            {"type": "output_text", "text": "  Let me run it.\n\n", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "status": "completed", "id": "fc_a1_2", "name": "exec_command",
         "arguments": '{"cmd":"echo 1"}', "call_id": "call_1"},
        {"type": "function_call", "status": "completed", "id": "fc_a1_3", "name": "exec_command",
         "arguments": '{"cmd":"echo 2"}', "call_id": "call_2"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "Output:\n1\n"},
        {"type": "function_call_output", "id": "fco_2", "call_id": "call_2", "output": [
            {"type": "input_text", "text": "Output:\n2\n"}]},
    ],
}  # fmt: skip


def test_codex() -> None:
    headers = {"x-codex-window-id": "01a22846-f0d7-7f80:3"}
    call = PROTOCOL.read(CODEX, headers)
    system, environment, user, turn, *results = call.messages
    assert system == {"role": "system", "content": "You are a coding agent.\nBe safe."}
    assert [environment["role"], user] == ["user", {"role": "user", "content": "run things"}]
    assert (turn["content"], turn["reasoning"]) == ("  Let me run it.\n\n", "I run it.\n")
    assert [one["id"] for one in turn["tool_calls"]] == ["call_1", "call_2"]  # type: ignore[attr-defined]
    assert results == [
        {"role": "tool", "content": "Output:\n1\n", "tool_call_id": "call_1"},
        {"role": "tool", "content": "Output:\n2\n", "tool_call_id": "call_2"},
    ]
    shell, agent = call.tools
    function = {key: SHELL[key] for key in ("name", "description", "parameters")}
    assert shell["function"] == function
    assert agent["function"] == function | {"name": "multi_agent_v1__exec_command"}
    assert call.dropped == ("tool:custom", "tool:web_search")
    assert (call.stream, call.summary, call.model) == (True, True, "gpt-5.1-codex")
    assert call.lineage.compaction == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_within_a_namespace(stream: bool) -> None:
    call = PROTOCOL.read(CODEX, {})
    use = ToolUse("call_9", "multi_agent_v1__exec_command", "{}")
    answer: Any = Answer("a1", "m", 1, (alternative(TurnText("", "", (use,))),), USAGE)
    item: Any
    if stream:
        events = sent_events(b"".join(events_of(PROTOCOL, call, answer, piece=9)))
        [item] = [data["item"] for name, data in events if name == "response.output_item.done"]
        [done] = [data for name, data in events if name == "response.function_call_arguments.done"]
        assert done["name"] == "exec_command"
    else:
        [item] = PROTOCOL.answer(call, answer)["output"]  # type: ignore[misc]
    assert (item["namespace"], item["name"]) == ("multi_agent_v1", "exec_command")
    result = {"type": "function_call_output", "call_id": "call_9", "output": "1"}
    again = PROTOCOL.read({**CODEX, "input": [*CODEX["input"], item, result]}, {})
    assert again.messages[-2]["tool_calls"] == [use.message]


def test_instructions_come_first_and_input_may_be_a_text() -> None:
    call = PROTOCOL.read({"instructions": "Be brief.", "input": "Hello"}, {})
    assert call.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})


def test_settings() -> None:
    call = PROTOCOL.read(
        {
            "input": "x", "tools": [SHELL], "tool_choice": {"type": "function", "name": "exec_command"},
            "parallel_tool_calls": False, "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}},
            "include": ["message.output_text.logprobs"],
        },
        {},
    )  # fmt: skip
    assert call.choice == Choice(required=True, name="exec_command", parallel=False)
    assert (call.wanted.max_tokens, call.wanted.temperature, call.wanted.top_p) == (7, 0.5, 0.9)
    assert (call.schema, call.logprobs, call.dropped) == ({"type": "object"}, True, ())


def test_what_is_not_done_is_named() -> None:
    call = PROTOCOL.read(
        {"input": "x", "reasoning": {"effort": "high"}, "text": {"verbosity": "low"}, "truncation": "auto",
         "top_logprobs": 3, "context_management": [{"type": "compaction"}], "max_tool_calls": 3, "user": "me"},
        {},
    )  # fmt: skip
    assert sorted(call.dropped) == [
        "context_management", "reasoning.effort", "text.verbosity", "top_logprobs", "truncation",
    ]  # fmt: skip


def test_images() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    part = {"type": "input_image", "image_url": url, "detail": "auto"}
    given = [{**USER, "content": [{"type": "input_text", "text": "see"}, part]}]
    assert PROTOCOL.read({"input": given}, {}).messages[0]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image", "image": b"PNG"},
    ]


def test_reasoning_is_read_from_the_summary_if_there_is_no_other() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}]}
    said = {"role": "assistant", "content": "yes"}
    turn = PROTOCOL.read({"input": [USER, thought, said, USER]}, {}).messages[1]
    assert turn == {"role": "assistant", "content": "yes", "reasoning": "short"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "send the whole conversation as input"),
        ({"input": "x", "conversation": "conv_1"}, "conversation is not supported"),
        ({"input": "x", "background": True}, "background is not supported"),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "items by reference are not supported"),
        ({"input": [{"id": "msg_1"}]}, "items by reference are not supported"),
        ({"input": [USER, {"type": "web_search_call", "id": "ws_1"}]}, "'web_search_call' is not supported"),
        ({"input": [{**USER, "content": [{"type": "input_file", "file_id": "f"}]}]}, "'input_file' is not supported"),
        ({"input": [{**USER, "content": [{"type": "input_image", "image_url": "https://a/b.png"}]}]}, "downloads none"),
        ({"input": [USER, {"role": "assistant", "content": "I be"}]}, "the last message is the assistant's"),
        ({"input": []}, "input is a text or a list"),
        ({}, "input is a text or a list"),
        ({"input": "x", "tool_choice": "required"}, "has no functions"),
        ({"input": "x", "tools": [SHELL], "tool_choice": {"type": "function", "name": "other"}}, "'other'"),
        ({"input": "x", "tool_choice": {"type": "web_search"}}, "tool_choice .* is not supported"),
        ({"input": "x", "tools": [{"type": "function"}]}, "a function a name"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens is a positive integer"),
        ({"input": "x", "temperature": "hot"}, "temperature is a number"),
    ],
)
def test_refused(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        PROTOCOL.read(body, {})
    assert error.value.status == 400


def test_order_of_the_events() -> None:
    call = PROTOCOL.read({"input": "x", "stream": True}, {})
    answer = Answer("a1", "m", 1, (alternative(TurnText("think", "said", (WEATHER,))),), USAGE)
    events = sent_events(b"".join(events_of(PROTOCOL, call, answer, piece=9)))
    reasoning = ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    message = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    function = ["function_call_arguments.delta", "function_call_arguments.done"]
    items = [
        part for item in (reasoning, message, function) for part in ("output_item.added", *item, "output_item.done")
    ]
    expected = [f"response.{name}" for name in ("created", "in_progress", *items, "completed")]
    assert [name for name, _ in events] == expected
    assert [data["type"] for _, data in events] == expected
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert [data["output_index"] for _, data in events if "output_index" in data] == [0] * 6 + [1] * 6 + [2] * 4


def test_summary_is_streamed_if_it_is_asked_for() -> None:
    call = PROTOCOL.read({"input": "x", "stream": True, "reasoning": {"summary": "auto"}}, {})
    answer = Answer("a1", "m", 1, (alternative(TurnText("think", "said")),), USAGE)
    names = [name for name, _ in sent_events(b"".join(events_of(PROTOCOL, call, answer, piece=9)))]
    assert [name for name in names if name and "summary" in name] == [
        f"response.reasoning_summary_{name}" for name in ("part.added", "text.delta", "text.done", "part.done")
    ]


def test_sdk_gets_the_same_from_a_stream_as_from_a_body() -> None:
    endpoint = Endpoint(PROTOCOL)
    client = openai_client(endpoint)
    endpoint.will_say(TWO_CALLS, TWO_CALLS)
    whole = client.responses.create(model="m", input="x", reasoning={"summary": "auto"})
    with client.responses.stream(model="m", input="x", reasoning={"summary": "auto"}) as events:
        streamed = events.get_final_response()

    def said(response: Any) -> list[Any]:
        parsed: Any = {"id": True, "parsed_arguments": True, "content": {"__all__": {"parsed"}}}
        return [item.model_dump(exclude=parsed) for item in response.output]

    assert said(streamed) == said(whole)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].summary[0].text == whole.output[0].content[0].text == TWO_CALLS.reasoning
    assert whole.output_text == TWO_CALLS.content
    for response in (whole, streamed):
        assert (response.status, response.model, response.tool_choice) == ("completed", "m", "auto")
        usage = response.usage
        assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (100, 20, 120)
        assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (40, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_was_cut(stream: bool) -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.append(alternative(TurnText("long thoughts", ""), Finish.LENGTH))
    client = openai_client(endpoint)
    if stream:
        events = list(client.responses.create(model="m", input="x", stream=True))
        assert events[-1].type == "response.incomplete"
        response = events[-1].response
    else:
        response = client.responses.create(model="m", input="x")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [(item.type, item.status) for item in response.output] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.append(logged(TurnText("", "Hi there"), ["Hi", " there"]))
    client = openai_client(endpoint)
    asked: Any = {"model": "m", "input": "x", "include": ["message.output_text.logprobs"]}
    if stream:
        with client.responses.stream(**asked) as events:
            response = events.get_final_response()
    else:
        response = client.responses.create(**asked)
    logprobs = response.output[0].content[0].logprobs
    assert [(one.token, round(one.logprob, 3)) for one in logprobs] == [("Hi", -1.0), (" there", -0.1)]


def test_errors() -> None:
    client = openai_client(Endpoint(PROTOCOL))
    with pytest.raises(openai.BadRequestError, match="send the whole conversation as input"):
        client.responses.create(model="m", input="x", previous_response_id="resp_1")
    body: Any = PROTOCOL.error(ContextFull(300, 200))
    assert body["error"]["code"] == "context_length_exceeded"  # the word that Codex looks for
    stream = PROTOCOL.stream(PROTOCOL.read({"input": "x"}, {}), "m")
    stream.begin("a1", 1)
    ((name, data),) = sent_events(stream.error(RequestError("no engine is left", status=503, code="no_engine")))
    failed: Any = data["response"]
    assert (name, failed["status"]) == ("response.failed", "failed")
    assert failed["error"] == {"code": "server_error", "message": "no engine is left"}
