"""Any body is read or refused with a message: what an agent sends never ends in another error."""

import copy
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.gateway.protocols.anthropic import AnthropicMessages
from millrace.gateway.protocols.base import AgentProtocol, RequestError
from millrace.gateway.protocols.chat import ChatCompletions
from millrace.gateway.protocols.completions import Completions
from millrace.gateway.protocols.responses import Responses
from tests.gateway.test_protocols_anthropic import CLAUDE_CODE
from tests.gateway.test_protocols_chat import QWEN_CODE
from tests.gateway.test_protocols_responses import CODEX

OTHERS: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "text",
    [],
    {},
    ["text"],
    [[]],
    [None],
    {"type": "text"},
    {"type": 1},
    {"a": {}},
]
BODIES = [
    pytest.param(ChatCompletions(), QWEN_CODE, id="chat"),
    pytest.param(Responses(), CODEX, id="responses"),
    pytest.param(AnthropicMessages(), CLAUDE_CODE, id="anthropic"),
    pytest.param(Completions(), {"prompt": [1, 2], "n": 2, "stop": ["a"], "logit_bias": {"1": 2}}, id="completions"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@pytest.mark.parametrize(("protocol", "body"), BODIES)
@settings(max_examples=400)
@given(data=st.data())
def test_any_body_is_read_or_refused(protocol: AgentProtocol, body: Any, data: st.DataObject) -> None:
    changed = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places(changed)[1:]))
        inner = changed
        for key in path:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = copy.deepcopy(data.draw(st.sampled_from(OTHERS)))
        else:
            del inner[last]
        if not changed:
            break
    with suppress(RequestError):
        call = protocol.read(changed, {})
        assert call.identity
        assert len(call.prefixes) == len(call.messages) + 1
