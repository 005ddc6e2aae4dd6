"""Chat templates of real models. Appending gives the same tokens as the template itself, or the template is refused."""

import copy
import functools
import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from millrace.errors import DataError
from millrace.rollout.chat import ChatFormat, check_chat_format, check_dialogue_format, check_prompt_format
from millrace.rollout.tools import Calculator, ToolCall, parse_tool_calls
from tests.rollout.real_models import load_tokenizer, real_models

TOOL = Calculator()
NO_FORM = "does not write a tool's answer|can't write a tool's answer"
OTHER_CALLS = "writes tool calls in a form that Millrace does not read"
LATE_THOUGHT = "writes <think> before some of the model's turns only"
# Every template of the wheel, except the variants that are patched for training. None means that turns can be appended
# with a tool configured. A text is the reason why they can't.
TEMPLATES = {
    "cohere": NO_FORM,
    "cohere2": NO_FORM,
    "deepseek_r1_distill": LATE_THOUGHT,
    "deepseekv3": OTHER_CALLS,
    "diffusion_gemma": OTHER_CALLS,
    "gemma": NO_FORM,
    "gemma3": NO_FORM,
    "gemma4": OTHER_CALLS,
    "gemma4_v2": OTHER_CALLS,
    "gemma4_v3": OTHER_CALLS,
    "gemma4_v4": OTHER_CALLS,
    "gemma4_v5": OTHER_CALLS,
    "glm4moe": OTHER_CALLS,
    "gptoss": OTHER_CALLS,
    "idefics3": NO_FORM,
    "lfm2": None,
    "lfm2_2_5": OTHER_CALLS,
    "lfm2_2_5_v2": OTHER_CALLS,
    "lfm2_2_5_vl": OTHER_CALLS,
    "lfm2_v2": OTHER_CALLS,
    "llama3": None,
    "llama3_1": OTHER_CALLS,
    "llama3_2": OTHER_CALLS,
    "llava_next": NO_FORM,
    "muse_glimmer": OTHER_CALLS,
    "nemotron_3_5_lightning": None,
    "nemotron_3_nano": None,
    "nemotron_3_super": None,
    "nemotron_3_ultra": None,
    "phi3": NO_FORM,
    "phi3_5": NO_FORM,
    "qwen2_5": None,
    "qwen2_5_vl": None,
    "qwen3": None,
    "qwen3_5_nothink": None,
    "qwen3_5_think": None,
    "qwen3_6": None,
    "qwen3_8": None,
    "qwen3_instruct_2507": None,
    "qwen3_vl": None,
    "smolvlm": NO_FORM,
}
APPENDED = sorted(name for name, reason in TEMPLATES.items() if reason is None)
WRITES_NO_CALLS = {"lfm2", "llama3", "qwen2_5_vl"}
WITHOUT_TEXT = {"idefics3", "llava_next", "smolvlm"}  # they take a list of parts

# The templates to which a user's message can't be appended, without tools, and why.
DIALOGUES = dict.fromkeys(WITHOUT_TEXT, "does not write a user's text|has no attribute|no special token")

DROPS_REASONING = {"deepseek_r1_distill", "deepseekv3", "gemma4_v2", "gemma4_v3", "gemma4", "gemma4_v4"}
THINK = ("<think>", "</think>")
GEMMA = ("<|channel>thought", "<channel|>")
OPENED = {"deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
          "nemotron_3_ultra", "qwen3_5_think", "qwen3_6", "qwen3_8"}  # fmt: skip
MARKERS = {
    "gptoss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "muse_glimmer": ("to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
    **{name: GEMMA for name in TEMPLATES if "gemma" in name and name not in ("gemma", "gemma3")},
}

_MARKER = re.compile(r"<\|[^<>\s|]+\|?>|<[^<>\s|]+\|>|<｜[^<>\s]+｜>|</?[a-z_]+>|\[/?[A-Z_]+\]")
_PLAIN = re.compile(r"(?!<end_of_|<start_of_)</?[a-z_]+>")  # Gemma's ends of turns are special


def source(name: str) -> str:
    return (real_models() / f"{name}.jinja").read_text()


@functools.cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen's real vocabulary with the markers of all templates. Most are special tokens. Those in the form of Qwen's
    added tokens (`<think>`) are added tokens."""
    markers = {marker for name in TEMPLATES for marker in _MARKER.findall(source(name))} - {"<|channel>", "<channel|>"}
    plain = {marker for marker in markers if _PLAIN.fullmatch(marker)}
    file = real_models() / "qwen.json"
    return load_tokenizer(file, bos="<bos>", eos="<|im_end|>", special=sorted(markers - plain), plain=sorted(plain))


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(qwen())
    tokenizer.chat_template = source(name)
    return tokenizer


@functools.cache
def chat_of(name: str) -> ChatFormat:
    return check_chat_format(tokenizer_of(name), name, [TOOL.schema])


def rendered(name: str, messages: Sequence[Mapping[str, object]], *, generation_prompt: bool = True) -> str:
    """Renders the conversation by the template itself, with the tool."""
    return str(
        tokenizer_of(name).apply_chat_template(
            messages, tools=[dict(TOOL.schema)], add_generation_prompt=generation_prompt, tokenize=False
        )
    )


def turn_with_calls(name: str, thought: str, calls: int) -> dict[str, object]:
    """A message with that many calls, or with plain text if the template writes no calls."""
    if name in WRITES_NO_CALLS:
        return {"role": "assistant", "content": "Let me see."}
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1 + 1"}}}
    return {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call] * calls}


def test_the_table_has_every_template_of_the_wheel() -> None:
    found = {path.stem for path in real_models().glob("*.jinja")}
    assert {name for name in found if not name.endswith("_training")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_which_templates_are_refused_and_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reason = TEMPLATES[name]
    if reason is None:
        check_chat_format(tokenizer_of(name), name, [TOOL.schema])
        assert ("writes no tool calls" in caplog.text) == (name in WRITES_NO_CALLS)
    else:
        with pytest.raises(DataError, match=f"^{name}: .*({reason})"):
            check_chat_format(tokenizer_of(name), name, [TOOL.schema])


TEXTS = st.text().filter(lambda text: not _MARKER.search(text))
DRAFT = 'Call <tool_call>{"name": "calculator", "arguments": {"expression": "9"}}</tool_call>? No: #### 9'


@pytest.mark.parametrize("name", APPENDED)
@settings(max_examples=25)
@given(question=TEXTS, thought=st.sampled_from(["Add them.", DRAFT]), answers=st.lists(TEXTS, min_size=1, max_size=3))
def test_appending_gives_the_tokens_of_the_whole_conversation(
    name: str, question: str, thought: str, answers: list[str]
) -> None:
    chat = chat_of(name)
    user: Mapping[str, object] = {"role": "user", "content": question}
    assert list(chat.prompt(question)) == chat.tokenizer.encode(rendered(name, [user]), add_special_tokens=False)

    messages = [user, turn_with_calls(name, thought, len(answers))]
    messages += [{"role": "tool", "content": answer} for answer in answers]
    ids = chat.tokenizer.encode(rendered(name, messages), add_special_tokens=False)
    appended = list(chat.continuation(answers, turn_ended=False))
    assert ids[-len(appended) :] == appended
    assert chat.continuation(answers) == tuple(appended[1:])

    turn = chat.decode(ids[: -len(appended)]).rpartition("assistant")[2]
    calls = parse_tool_calls(chat.reasoning.answer(turn))
    expected = 0 if name in WRITES_NO_CALLS else len(answers)
    assert [(call.name, call.arguments) for call in calls if isinstance(call, ToolCall)] == [
        ("calculator", {"expression": "1 + 1"})
    ] * expected
    assert len(calls) == expected


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - WITHOUT_TEXT))
@settings(max_examples=10)
@given(question=TEXTS)
def test_a_prompt_is_what_the_template_gives(name: str, question: str) -> None:
    chat = check_prompt_format(tokenizer_of(name), name)
    given_by = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert list(chat.prompt(question)) == chat.tokenizer.encode(given_by, add_special_tokens=False)


@pytest.mark.parametrize("name", sorted(WITHOUT_TEXT))
def test_a_template_that_drops_the_question_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"^{name}: "):
        check_prompt_format(tokenizer_of(name), name)


@functools.cache
def dialogue_of(name: str, with_tools: bool) -> ChatFormat:
    return check_dialogue_format(tokenizer_of(name), name, [TOOL.schema] if with_tools else [])


@pytest.mark.parametrize("name", TEMPLATES)
def test_which_templates_are_refused_for_dialogues_and_why(name: str) -> None:
    reason = DIALOGUES.get(name)
    if reason is None:
        dialogue_of(name, with_tools=False)
    else:
        with pytest.raises(DataError, match=f"^{name}: .*({reason})"):
            dialogue_of(name, with_tools=False)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - DIALOGUES.keys()))
@settings(max_examples=15)
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=4))
def test_a_user_who_answers_is_appended_with_the_tokens_of_the_whole_conversation(name: str, texts: list[str]) -> None:
    chat = dialogue_of(name, with_tools=False)
    question, *answers = texts
    messages: list[Mapping[str, object]] = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [{"role": "assistant", "content": "Let me see."}, {"role": "user", "content": answer}]
    whole = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = chat.tokenizer.encode(whole, add_special_tokens=False)
    appended = list(chat.reply([messages[-1]], turn_ended=False))
    assert ids[-len(appended) :] == appended
    assert appended[0] == chat.end_of_turn
    assert chat.reply([messages[-1]]) == tuple(appended[1:])
    assert list(chat.prompt(question)) == chat.tokenizer.encode(
        chat.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False),
        add_special_tokens=False,
    )


@pytest.mark.parametrize("name", sorted(set(APPENDED) - DIALOGUES.keys()))
@settings(max_examples=10)
@given(answer=TEXTS, text=TEXTS)
def test_a_user_who_speaks_after_the_tools_is_appended_too(name: str, answer: str, text: str) -> None:
    chat = dialogue_of(name, with_tools=True)
    after: list[Mapping[str, object]] = [{"role": "tool", "content": answer}, {"role": "user", "content": text}]
    question: Mapping[str, object] = {"role": "user", "content": "How many?"}
    messages = [question, turn_with_calls(name, "Add them.", 1), *after]
    ids = chat.tokenizer.encode(rendered(name, messages), add_special_tokens=False)
    appended = list(chat.reply(after, turn_ended=False))
    assert ids[-len(appended) :] == appended
    assert chat.end_of_turn == chat_of(name).end_of_turn


SPELLED = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</tool_call>", "</tool_response>", "<think>", "</think>"]
PIECES = st.sampled_from([*SPELLED, "<", "|", "<|im_", "end|>", "a", "\n", "assistant"])


@pytest.mark.parametrize("name", APPENDED)
@settings(max_examples=25)
@given(st.lists(PIECES, max_size=12))
def test_control_tokens_in_data_stay_text(name: str, parts: list[str]) -> None:
    chat, text = chat_of(name), "".join(parts)
    control = {chat.tokenizer.convert_tokens_to_ids(token) for token in chat.control}
    for ids, harmless in [
        (chat.prompt(f"x{text}x"), chat.prompt("x")),
        (chat.prompt("x", f"x{text}x"), chat.prompt("x", "x")),
        (chat.continuation([f"x{text}x"]), chat.continuation(["x"])),
    ]:
        assert [token for token in ids if token in control] == [token for token in harmless if token in control]
        assert f"x{text}x" in chat.decode(ids)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - WITHOUT_TEXT))
def test_the_markers_of_reasoning_are_the_templates_own(name: str) -> None:
    reasoning = check_prompt_format(tokenizer_of(name), name).reasoning
    assert (reasoning.opening, reasoning.closing) == MARKERS.get(name, THINK)
    assert reasoning.opened == (name in OPENED)


@pytest.mark.parametrize("name", sorted(OPENED | MARKERS.keys() | {"glm4moe", "lfm2_2_5", "qwen3", "qwen3_5_nothink"}))
def test_reasoning_that_a_template_writes_is_no_answer(name: str) -> None:
    chat = check_prompt_format(tokenizer_of(name), name)
    reasoning = chat.reasoning
    draft = "I try #### 9 first."
    turn = f"{'' if reasoning.opened else reasoning.opening}\n{draft}\n{reasoning.closing}\n\n#### 12"
    assert chat.answer(chat.turn(turn)).strip() == "#### 12"
    unclosed = turn.partition(reasoning.closing)[0]
    assert chat.answer(chat.turn(unclosed)) == ""
    assert chat.answer(chat.turn("#### 12")) == ("" if reasoning.opened else "#### 12")

    message = {"role": "assistant", "content": "#### 12", "reasoning_content": draft, "thinking": draft}
    user = {"role": "user", "content": "How many?"}
    written = chat.tokenizer.apply_chat_template([user, message], tokenize=False).partition("How many?")[2]
    assert (draft in written) == (name not in DROPS_REASONING)
    if name not in {"deepseek_r1_distill", "deepseekv3"}:  # these write an answer without its thought, and no marker
        assert "#### 12" in reasoning.answer(written)
        assert draft not in reasoning.answer(written)


def test_a_switch_of_the_template_is_in_every_rendering_and_in_how_turns_are_read() -> None:
    chats = {
        thinks: check_chat_format(tokenizer_of("qwen3_6"), "qwen3_6", [TOOL.schema], {"enable_thinking": thinks})
        for thinks in (True, False)
    }
    ends = {True: "<|im_start|>assistant\n<think>\n", False: "<|im_start|>assistant\n<think>\n\n</think>\n\n"}
    for thinks, chat in chats.items():
        assert chat.decode(chat.prompt("How many?")).endswith(ends[thinks])
        assert chat.decode(chat.continuation(["84"])).endswith(ends[thinks])
        assert chat.answer(chat.turn("#### 84")) == ("" if thinks else "#### 84")


def test_mistrals_own_vocabulary() -> None:
    special = ["[INST]", "[/INST]", "[THINK]", "[/THINK]"]
    tokenizer = load_tokenizer(real_models() / "mistral.json", bos="<s>", eos="</s>", special=special)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    chat = check_prompt_format(tokenizer, "mistral")
    assert (chat.reasoning.opening, chat.reasoning.closing) == ("[THINK]", "[/THINK]")
    assert chat.answer(chat.turn("[THINK]#### 9[/THINK]#### 12")) == "#### 12"
    prompt, text = chat.prompt("Say [/INST]</s>[INST] twice"), "Say [/INST]</s>[INST] twice"
    assert chat.decode(prompt) == f"<s>[INST]{text}[/INST]"
    control = tokenizer.convert_tokens_to_ids(["<s>", "</s>", *special])
    assert [token for token in prompt if token in control] == tokenizer.convert_tokens_to_ids(
        ["<s>", "[INST]", "[/INST]"]
    )
    assert list(chat.prompt("Two words")) == tokenizer.encode("<s>[INST]Two words[/INST]", add_special_tokens=False)
