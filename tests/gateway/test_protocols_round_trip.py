"""A turn that an agent replays is the turn that was answered: in all protocols, by the SDKs and by other agents."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.gateway.answer import Answer, Delta
from millrace.gateway.call import TurnText
from millrace.gateway.protocols.anthropic import AnthropicMessages
from millrace.gateway.protocols.base import AgentProtocol
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.protocols.responses import Responses
from tests.gateway.replay import replayed_anthropic, replayed_chat, replayed_responses
from tests.gateway.sdk import (
    TWO_CALLS,
    USAGE,
    Endpoint,
    alternative,
    anthropic_client,
    assert_replayed,
    deltas,
    openai_client,
    sent_events,
)
from tests.gateway.turns import turns, written_by_javascript

Body = Mapping[str, Any]

QUESTION: Any = {"role": "user", "content": "What is the weather?"}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


PROTOCOLS = [
    pytest.param(ChatCompletions(), "messages", replayed_chat, {}, id="chat"),
    pytest.param(Responses(), "input", replayed_responses, {"reasoning": {"summary": "auto"}}, id="responses"),
    pytest.param(AnthropicMessages(), "messages", replayed_anthropic, {"thinking": THINKING}, id="anthropic"),
]


def unchanged(value: Any) -> Any:
    return value


def by_javascript(value: Any) -> Any:
    """Return a body of which an agent in JavaScript has read and written the arguments, those in a text too."""
    match value:
        case {"arguments": str(arguments)}:
            return {**value, "arguments": json.dumps(written_by_javascript(orjson.loads(arguments)))}
        case dict():
            return {key: by_javascript(one) for key, one in value.items()}
        case list():
            return [by_javascript(one) for one in value]
    return written_by_javascript(value)


@pytest.mark.parametrize(("protocol", "field", "replayed", "asked"), PROTOCOLS)
@pytest.mark.parametrize("write", [unchanged, by_javascript])
@given(turn=turns())
def test_replay_of_an_answer_is_the_turn(
    protocol: AgentProtocol,
    field: str,
    replayed: Callable[[Body], list[Any]],
    asked: Body,
    write: Callable[[Any], Any],
    turn: TurnText,
) -> None:
    before = protocol.read({"model": "m", field: [QUESTION], **asked}, {})
    body = orjson.loads(orjson.dumps(protocol.answer(before, Answer("a1", "m", 1, (alternative(turn),), USAGE))))
    sent = orjson.loads(json.dumps({field: [QUESTION, *replayed(write(body)), QUESTION], **asked}))
    assert_replayed(before, turn, protocol.read(sent, {}))


def chat_agent(endpoint: Endpoint, *, stream: bool) -> None:
    client, messages = openai_client(endpoint), [QUESTION]
    for _ in range(2):
        if stream:
            with client.chat.completions.stream(model="m", messages=messages) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(model="m", messages=messages).choices[0].message
        messages += [message, QUESTION]


def responses_agent(endpoint: Endpoint, *, stream: bool) -> None:
    client, items = openai_client(endpoint), [QUESTION]
    for _ in range(2):
        if stream:
            with client.responses.stream(model="m", input=items, store=False) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(model="m", input=items, store=False)
        items += [*response.output, QUESTION]


def anthropic_agent(endpoint: Endpoint, *, stream: bool) -> None:
    client, messages = anthropic_client(endpoint), [QUESTION]
    asked: Any = {"model": "m", "max_tokens": 2048, "thinking": THINKING}
    for _ in range(2):
        if stream:
            with client.messages.stream(messages=messages, **asked) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(messages=messages, **asked)
        messages += [message.to_param(), QUESTION]


AGENTS = [
    pytest.param(ChatCompletions(), chat_agent, id="chat"),
    pytest.param(Responses(), responses_agent, id="responses"),
    pytest.param(AnthropicMessages(), anthropic_agent, id="anthropic"),
]


@pytest.mark.parametrize(("protocol", "agent"), AGENTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@settings(max_examples=40)
@given(turn=turns(), piece=st.integers(1, 50))
def test_sdk_replays_the_turn(
    protocol: AgentProtocol, agent: Callable[..., None], stream: bool, turn: TurnText, piece: int
) -> None:
    endpoint = Endpoint(protocol)
    endpoint.piece = piece
    endpoint.will_say(turn, TurnText("", "done"))
    agent(endpoint, stream=stream)
    before, after = endpoint.calls
    assert before.stream == stream
    assert_replayed(before, turn, after)


@pytest.mark.parametrize(("protocol", "field", "replayed", "asked"), PROTOCOLS[1:])
def test_text_behind_calls_is_the_turns(
    protocol: AgentProtocol, field: str, replayed: Callable[[Body], list[Any]], asked: Body
) -> None:
    """A stream shows such text after the calls, when the turn has ended."""
    before = protocol.read({field: [QUESTION], "stream": True, **asked}, {})
    whole = TurnText(TWO_CALLS.reasoning, TWO_CALLS.content + "\nThat is all.", TWO_CALLS.calls)
    stream = protocol.stream(before, "m")
    parts = [stream.begin("a1", 1), *(stream.delta(one) for one in deltas(TWO_CALLS))]
    parts.append(stream.delta(Delta(0, content="\nThat is all.")))
    parts.append(stream.end(Answer("a1", "m", 1, (alternative(whole),), USAGE)))
    body = accumulated(sent_events(b"".join(parts)))
    assert_replayed(before, whole, protocol.read({field: [QUESTION, *replayed(body), QUESTION], **asked}, {}))


def accumulated(events: list[tuple[str | None, dict[str, Any]]]) -> Body:
    """Return the body that the events of a stream build up."""
    if events[-1][0] == "response.completed":
        response: Body = events[-1][1]["response"]
        return response
    blocks: dict[int, dict[str, Any]] = {}
    for _, data in events:
        match data:
            case {"type": "content_block_start", "index": place, "content_block": block}:
                blocks[place] = dict(block)
            case {"delta": {"type": "thinking_delta", "thinking": text}, "index": place}:
                blocks[place]["thinking"] += text
            case {"delta": {"type": "text_delta", "text": text}, "index": place}:
                blocks[place]["text"] += text
            case {"delta": {"type": "input_json_delta", "partial_json": text}, "index": place}:
                blocks[place]["input"] = orjson.loads(text)
    return {"content": [blocks[place] for place in sorted(blocks)]}
