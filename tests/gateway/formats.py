"""The formats of real templates, learned once."""

import functools
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from millrace.gateway.call import Tool
from millrace.gateway.format import TemplateFormat, learn_format
from millrace.rollout.reasoning import reasoning_keys
from tests.rollout.test_templates import TEMPLATES, WITHOUT_TEXT, tokenizer_of

# The kind of each template's tool calls. The others write none that can be read.
KINDS = {
    "deepseek_r1_distill": "named",
    "deepseekv3": "named",
    "glm4moe": "markup",
    "llama3_1": "object",
    "llama3_2": "object",
    "nemotron_3_5_lightning": "markup",
    "nemotron_3_nano": "markup",
    "nemotron_3_super": "markup",
    "nemotron_3_ultra": "markup",
    "qwen2_5": "object",
    "qwen3": "object",
    "qwen3_5_nothink": "markup",
    "qwen3_5_think": "markup",
    "qwen3_6": "markup",
    "qwen3_8": "markup",
    "qwen3_instruct_2507": "object",
    "qwen3_vl": "object",
}
READABLE = sorted(TEMPLATES.keys() - WITHOUT_TEXT)
ONE_CALL = {"llama3_1", "llama3_2"}  # their templates write one call in a turn
CALLS_AS_TEXT = {"deepseek_r1_distill", "deepseekv3"}

# Values of JSON. Whole numbers have at most 64 bits, as in other parsers.
WORDS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@functools.cache
def format_of(name: str) -> TemplateFormat:
    return learn_format(tokenizer_of(name), name)


def tool(name: str, **types: str) -> Tool:
    """A tool whose arguments have these types of JSON schema."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


def turn_text(name: str, turn: Mapping[str, object], tools: Sequence[Tool]) -> str:
    """A turn of the model as the template writes it behind its generation prompt, without the end of the turn."""
    turns = format_of(name)
    chat = turns._with(tools)
    question = {"role": "user", "content": "question"}
    given = {"role": "assistant", **reasoning_keys(" "), **turn}
    if name in CALLS_AS_TEXT:
        given["content"] = given["content"] or None
    opening = chat.reasoning.opening if chat.reasoning.opened else ""
    prompt = chat.template.render([question]).rstrip().removesuffix(opening)
    text = chat.template.render([question, given], False)
    assert text.startswith(prompt)
    text = text.removeprefix(prompt)
    if opening:  # DeepSeek's templates leave the reasoning out
        text = text.removeprefix(opening) if text.startswith(opening) else chat.reasoning.closing + text
    for token in (*turns.stop_token_ids, chat.tokenizer.eos_token_id):
        text = text.rstrip().removesuffix(chat.tokenizer.convert_ids_to_tokens(token))
    return text
