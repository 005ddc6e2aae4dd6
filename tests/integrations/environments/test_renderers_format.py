"""Kimi K2's conversations by the package `renderers`: its calls have ids that the model writes."""

import functools
from pathlib import Path

import pytest
import renderers
from transformers import PreTrainedTokenizerFast

from millrace.errors import ConfigError
from millrace.gateway.call import ToolUse, TurnText
from millrace.gateway.format import load_format
from millrace.gateway.renderers_format import RenderersFormat
from tests.rollout.real_models import load_tokenizer, real_models

MARKERS = (
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
ASKED = [{"role": "system", "content": "be terse"}, {"role": "user", "content": "3 + 4?"}]
CALL = (
    "I have to add.<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 3,  "b": 4}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
ANSWER = "It is 7.<|im_end|>"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    found = load_tokenizer(real_models() / "qwen.json", bos="[BOS]", eos="<|im_end|>", special=MARKERS)
    found.chat_template = "Kimi's own is not needed"
    return found


@functools.cache
def kimi() -> RenderersFormat:
    return RenderersFormat(tokenizer(), renderers.create_renderer(tokenizer(), renderers.config_from_name("kimi-k2")))


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def test_a_turn_has_its_calls_with_the_ids_that_the_model_wrote() -> None:
    turn = kimi().read(CALL, [TOOL])
    assert turn.content == "I have to add."
    assert turn.calls == (ToolUse("functions.add:0", "add", '{"a":3,"b":4}'),)
    answer = kimi().read(ANSWER, [TOOL])
    assert (answer.content, answer.calls, answer.malformed) == ("It is 7.", (), None)


def test_a_call_that_is_no_json_stays_in_the_content() -> None:
    turn = kimi().read(CALL.replace('"b": 4}', '"b": '), [TOOL])
    assert turn.calls == ()
    assert turn.malformed is not None
    assert "functions.add:0" in turn.content


def test_a_tools_answer_follows_the_sampled_tokens() -> None:
    prompt = kimi().prompt(ASKED, [TOOL])
    assert "be terse" in tokenizer().decode(prompt)
    turn = kimi().read(CALL, [TOOL])
    added = [{"role": "tool", "content": "7", "tool_call_id": "functions.add:0", "name": "add"}]
    bridge = kimi().bridge((*prompt, *ids(CALL)), turn.message, added, [TOOL])
    assert bridge is not None
    whole = kimi().prompt([*ASKED, turn.message, *added], [TOOL])
    assert whole[-len(bridge) :] == bridge
    assert "## Return of functions.add:0\n7" in tokenizer().decode(bridge)


def test_messages_of_the_assistant_are_not_appended() -> None:
    prompt = kimi().prompt(ASKED, [TOOL])
    turn = kimi().read(ANSWER, [TOOL]).message
    added = [{"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}]
    assert kimi().bridge((*prompt, *ids(ANSWER)), turn, added, [TOOL]) is None


def test_a_stream_shows_nothing_before_the_turn_has_ended() -> None:
    assert kimi().read(CALL[: len(CALL) // 2], [TOOL], ended=False) == TurnText("", "")


def test_an_unknown_renderer_is_named(tmp_path: Path) -> None:
    tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"gateway\.format: renderers has none for kimi-k3"):
        load_format(str(tmp_path), "renderers:kimi-k3")
    with pytest.raises(ConfigError, match="renderers does not know the model"):
        load_format(str(tmp_path), "renderers")
