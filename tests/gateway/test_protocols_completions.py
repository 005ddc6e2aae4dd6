"""OpenAI's completions: a text or token ids that the model continues, each a root of its own."""

from typing import Any

import openai
import pytest

from millrace.gateway.answer import Finish
from millrace.gateway.call import TurnText
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.protocols.completions import Completions
from millrace.gateway.tree import Tree
from tests.gateway.sdk import Endpoint, alternative, logged, openai_client

PROTOCOL = Completions()


@pytest.mark.parametrize("prompt", ["Once upon", ["Once upon"]])
def test_text(prompt: Any) -> None:
    call = PROTOCOL.read({"model": "m", "prompt": prompt, "max_tokens": 5, "stop": "\n", "logprobs": 0}, {})
    assert (call.prompt, call.wanted.max_tokens, call.wanted.stop, call.logprobs) == ("Once upon", 5, ("\n",), True)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids(prompt: Any) -> None:
    assert PROTOCOL.read({"prompt": prompt}, {}).prompt == (1, 2, 3)


def test_prompt_is_the_identity() -> None:
    same, other, ids = (PROTOCOL.read({"prompt": prompt}, {}) for prompt in ("1 2", "1 3", [1, 2]))
    assert same.identity == PROTOCOL.read({"prompt": "1 2"}, {}).identity
    assert len({call.identity for call in (same, other, ids)}) == 3


def test_completion_attaches_to_nothing() -> None:
    place = Tree().place(PROTOCOL.read({"prompt": "Once upon"}, {}))
    assert (place.parent, place.reason, len(place.added)) == (None, None, 1)
    chat = ChatCompletions().read({"messages": [{"role": "user", "content": "Once upon"}]}, {})
    assert chat.identity != PROTOCOL.read({"prompt": "Once upon"}, {}).identity


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is a text or a list of token ids"),
        ({"prompt": ""}, "prompt is a text or a list of token ids"),
        ({"prompt": []}, "prompt is a text or a list of token ids"),
        ({"prompt": [True]}, "prompt is a text or a list of token ids"),
        ({"prompt": [-1]}, "token ids are not negative"),
        ({"prompt": ["a", "b"]}, "more than one prompt"),
        ({"prompt": [[1], [2]]}, "more than one prompt"),
        ({"prompt": "a", "echo": True}, "echo is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "a", "n": 0}, "n is a positive integer"),
    ],
)
def test_refused(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PROTOCOL.read(body, {})


def test_sdk() -> None:
    endpoint = Endpoint(PROTOCOL)
    turns = [TurnText("", " a time"), TurnText("", " <think>a")]
    endpoint.turns.extend([alternative(turns[0]), alternative(turns[1], Finish.LENGTH)] * 2)
    client = openai_client(endpoint)
    whole = client.completions.create(model="m", prompt="Once upon", n=2)
    assert [(one.text, one.finish_reason) for one in whole.choices] == [(" a time", "stop"), (" <think>a", "length")]
    assert (whole.model, whole.usage.prompt_tokens, whole.usage.completion_tokens) == ("m", 100, 20)
    texts: list[str] = ["", ""]
    usage: Any = None
    for chunk in client.completions.create(
        model="m", prompt="Once upon", n=2, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [" a time", " <think>a"]
    assert usage.total_tokens == 120
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.completions.create(model="m", prompt="Once upon", echo=True)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    endpoint = Endpoint(PROTOCOL)
    endpoint.turns.append(logged(TurnText("", " a time"), [" a", " time"]))
    client = openai_client(endpoint)
    made = client.completions.create(model="m", prompt="Once upon", logprobs=1, stream=stream)
    logprobs = list(made)[-1].choices[0].logprobs if stream else made.choices[0].logprobs
    assert (logprobs.tokens, logprobs.text_offset) == ([" a", " time"], [0, 2])
    assert [round(one, 3) for one in logprobs.token_logprobs] == [-1.0, -0.1]
