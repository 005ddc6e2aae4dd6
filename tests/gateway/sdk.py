"""The clients of agents before a protocol of the gateway, which answers them with given turns."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import anthropic
import httpx2
import numpy as np
import openai
import orjson

from millrace.gateway.answer import Alternative, Answer, Delta, Finish, Usage
from millrace.gateway.call import ModelCall, ToolUse, TurnText, extended, fingerprint, reasoning_of
from millrace.gateway.protocols.base import AgentProtocol, RequestError

USAGE = Usage(prompt=100, cached=40, output=20, reasoning=5)


class Endpoint:
    """Answers requests with the turns that it is given, in order. calls: what was read of the requests."""

    def __init__(self, protocol: AgentProtocol) -> None:
        self.protocol = protocol
        self.turns: deque[Alternative] = deque()
        self.calls: list[ModelCall] = []
        self.bodies: list[dict[str, object]] = []
        self.piece = 3  # characters of a delta
        self._ids = itertools.count(1)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        try:
            body = orjson.loads(request.content)
            call = self.protocol.read(body, request.headers)
        except RequestError as error:
            return httpx2.Response(error.status, json=self.protocol.error(error))
        self.bodies.append(body)
        self.calls.append(call)
        alternatives = tuple(self.turns.popleft() for _ in range(call.n))
        answer = Answer(f"a{next(self._ids)}", "the-model", 1700000000, alternatives, USAGE)
        if not call.stream:
            return httpx2.Response(200, content=orjson.dumps(self.protocol.answer(call, answer)))
        events = b"".join(events_of(self.protocol, call, answer, self.piece))
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=events)

    def will_say(self, *turns: TurnText) -> None:
        """Answer the next requests with these turns."""
        self.turns.extend(alternative(turn) for turn in turns)


def alternative(turn: TurnText, finish: Finish | None = None) -> Alternative:
    """Return a turn as an answer that has ended by itself, or for another reason."""
    return Alternative(turn, finish or (Finish.TOOL_CALLS if turn.calls else Finish.STOP))


def events_of(protocol: AgentProtocol, call: ModelCall, answer: Answer, piece: int = 3) -> Iterator[bytes]:
    """Yield the events of a streamed answer, with a ping among them."""
    stream = protocol.stream(call, answer.model)
    yield stream.begin(answer.id, answer.created)
    yield stream.ping()
    for index, one in enumerate(answer.alternatives):
        for delta in deltas(one.turn, index, piece):
            yield stream.delta(delta)
    yield stream.end(answer)


def deltas(turn: TurnText, index: int = 0, piece: int = 3) -> Iterator[Delta]:
    """Yield what a stream adds for a turn."""
    for place in range(0, len(turn.reasoning), piece):
        yield Delta(index, reasoning=turn.reasoning[place : place + piece])
    for place in range(0, len(turn.content), piece):
        yield Delta(index, content=turn.content[place : place + piece])
    for place, call in enumerate(turn.calls):
        yield Delta(index, call=call, call_index=place)


def openai_client(endpoint: Endpoint) -> openai.OpenAI:
    """Return OpenAI's client before an endpoint."""
    http = httpx2.Client(transport=httpx2.MockTransport(endpoint))
    return openai.OpenAI(api_key="key", base_url="http://gateway/v1", http_client=http, max_retries=0)


def anthropic_client(endpoint: Endpoint) -> anthropic.Anthropic:
    """Return Anthropic's client before an endpoint."""
    http = httpx2.Client(transport=httpx2.MockTransport(endpoint))
    return anthropic.Anthropic(api_key="key", base_url="http://gateway", http_client=http, max_retries=0)


def sent_events(content: bytes) -> list[tuple[str | None, dict[str, object]]]:
    """Return the names and the data of server-sent events."""
    found = []
    for block in content.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in lines and lines["data"] != "[DONE]":
            found.append((lines.get("event"), orjson.loads(lines["data"])))
    return found


def assert_replayed(before: ModelCall, turn: TurnText, after: ModelCall, *, reasoning: bool = True) -> None:
    """Assert that a request extends the one before it by the turn that answered it, as the tree finds it."""
    length = len(before.messages) + 1
    replayed = after.messages[length - 1]
    assert fingerprint(replayed) == fingerprint(turn.message)
    assert reasoning_of(replayed) == (reasoning_of(turn.message) if reasoning else None)
    digest = extended(before.prefixes[-1], turn.message)
    assert after.prefixes[length] == digest


def logged(turn: TurnText, texts: Sequence[str]) -> Alternative:
    """Return a turn with a logprob for each token."""
    logprobs = np.linspace(-1, -0.1, len(texts), dtype=np.float32)
    return Alternative(turn, Finish.STOP, None, tuple(range(len(texts))), logprobs, tuple(texts))


WEATHER = ToolUse("call_1", "weather", '{"city": "Zürich", "days": 2.0}')
TIME = ToolUse("call_2", "time", '{ "zone" : "CET" }')
TWO_CALLS = TurnText("I need both.\n", "  Let me look.\n\n", (WEATHER, TIME))
