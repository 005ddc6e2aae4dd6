"""Conversations as token ids. Appending gives the same tokens as the template, and templates that can't do that are
refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from millrace.errors import DataError
from millrace.rollout.chat import ChatFormat, check_chat_format, check_prompt_format, load_chat_format
from millrace.rollout.control_tokens import break_control_tokens
from millrace.rollout.tools import Calculator
from millrace.train.tiny import CHAT_TEMPLATE, make_tiny_tokenizer

TOOLS = [Calculator().schema]
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 7"}}\n</tool_call>'

# This part of Qwen3's template makes appending hard. The last turn gets an empty thought in front of it, which goes
# when a tool has answered. Tool answers in a row share one user message.
THINKING_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message.role == 'assistant' and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".strip()


def chat_format(
    template: str | dict[str, str] | None = None, tools: Sequence[Mapping[str, object]] = (), **kwargs: object
) -> ChatFormat:
    tokenizer = make_tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return check_chat_format(tokenizer, "model", tools, kwargs)


CHATS = {"tiny": chat_format(), "tools": chat_format(tools=TOOLS), "thinking": chat_format(THINKING_TEMPLATE)}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("answers", [["84"], ["84", "Error: division by zero"]])
def test_appending_gives_what_the_template_gives(name: str, answers: list[str]) -> None:
    chat = CHATS[name]
    appended = (*chat.prompt("How many?"), *chat.turn(CALL), *chat.continuation(answers))
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": CALL}]
    messages += [{"role": "tool", "content": answer} for answer in answers]
    tools = [dict(tool) for tool in chat.template.tools] or None
    whole = chat.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert chat.decode(appended) == whole
    assert list(appended) == chat.tokenizer.encode(whole, add_special_tokens=False)


def test_the_prompt_has_the_question_the_tools_and_the_system_prompt_once() -> None:
    text = CHATS["tools"].decode(CHATS["tools"].prompt("How many eggs?", "Be brief. "))
    assert text == (
        "<|im_start|>system\nBe brief. Tools: calculator<|im_end|>\n"
        "<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "system" not in CHATS["tiny"].decode(CHATS["tiny"].prompt("How many eggs?"))


def test_a_turn_cut_short_is_ended_before_the_answer() -> None:
    chat = CHATS["tiny"]
    assert chat.continuation(["84"], turn_ended=False) == (chat.end_of_turn, *chat.continuation(["84"]))
    assert chat.decode([chat.end_of_turn]) == "<|im_end|>"


@settings(max_examples=50)
@given(answer=st.text(), name=st.sampled_from(sorted(CHATS)))
def test_any_answer_can_be_appended(answer: str, name: str) -> None:
    text = CHATS[name].decode(CHATS[name].continuation([answer]))
    assert text == f"\n<|im_start|>user\n<tool_response>\n{answer}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages[0].content }}<|im_end|>", "does not write a tool's answer"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}", "does not write a tool's"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "rewrites earlier turns",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content[:12] }}<|im_end|>{% endfor %}", "does not write a tool's answer"),
    ],
)
def test_templates_that_cant_be_appended_to_are_refused(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        chat_format(template)
    assert str(raised.value).startswith("model: ")


PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# This template writes a tool's answer differently if there are tools, and reads a variable.
BRANCHING = (
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if tools and m.role == 'tool' else m.role) + '\\n' }}"
    "{{ ('TOOL ' if tools and m.role == 'tool' else '') + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('' if loud else 'quietly: ') }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [{"default": PLAIN, "tool_use": CHAT_TEMPLATE}, BRANCHING, CHAT_TEMPLATE],
    ids=["named", "branch", "tiny"],
)
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "none"])
@pytest.mark.parametrize("kwargs", [{}, {"loud": True}])
def test_the_prompt_and_every_later_turn_are_rendered_alike(
    template: str | dict[str, str], tools: list[Mapping[str, object]], kwargs: dict[str, object]
) -> None:
    if kwargs and template != BRANCHING:
        with pytest.raises(DataError, match="^model: the chat template has no variable loud"):
            chat_format(template, tools, **kwargs)
        return
    chat = chat_format(template, tools, **kwargs)
    appended = (*chat.prompt("How many?"), *chat.turn(CALL), *chat.continuation(["84"]))
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": CALL}]
    messages += [{"role": "tool", "content": "84"}]
    whole = chat.tokenizer.apply_chat_template(
        messages, tools=[dict(tool) for tool in tools] or None, add_generation_prompt=True, tokenize=False, **kwargs
    )
    # A template never writes its generation prompt into an earlier turn.
    assert chat.decode(appended).replace("quietly: <", "<") == whole.replace("quietly: <", "<")


def test_arguments_that_the_rendering_itself_takes_are_refused() -> None:
    with pytest.raises(DataError, match="^model: add_generation_prompt is an argument of apply_chat_template"):
        chat_format(add_generation_prompt=False)


def test_named_templates_without_a_default() -> None:
    with pytest.raises(DataError, match="^model: .*no default"):
        chat_format({"rag": PLAIN})


def test_another_form_of_calls_is_refused_where_there_are_tools() -> None:
    template = CHAT_TEMPLATE.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    chat_format(template)
    with pytest.raises(DataError, match="^model: .*in a form that Millrace does not read.*<call>"):
        chat_format(template, TOOLS)


# Like Llama 2 and Mistral's first models, it puts a space before the first word of a text.
def test_a_tokenizer_that_puts_a_space_before_the_first_word() -> None:
    vocabulary = {letter: index for index, letter in enumerate("▁<>|/_abcdefghijklmnopqrstuvwxyz")}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="a"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<|u|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<|u|>{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = check_prompt_format(tokenizer, "model")
    assert chat.decode(chat.prompt("hello there")) == "<s><|u|>hello there</s>"
    assert chat.decode(chat.prompt("hel</s>lo the<|u|>re")) == "<s><|u|>hel</s>lo the<|u|>re</s>"
    assert chat.prompt("hel</s>lo").count(tokenizer.eos_token_id) == 1


@given(st.text(alphabet=st.characters(exclude_categories=["Cc"])))
def test_any_question_is_in_the_prompt(question: str) -> None:
    text = CHATS["tiny"].decode(CHATS["tiny"].prompt(question))
    shown = question.encode(errors="replace").decode()  # half a surrogate pair has no encoding
    assert text == f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n"


CONTROL = st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_response>", "<|endoftext|>"])


@given(st.lists(st.one_of(CONTROL, st.text(alphabet="<|im_end>/tool ", max_size=6), st.characters()), max_size=8))
def test_text_that_spells_control_tokens_stays_text(parts: list[str]) -> None:
    text, chat = "".join(parts), CHATS["tools"]
    control = set(chat.tokenizer.convert_tokens_to_ids(list(chat.control)))
    for ids, harmless in [
        (chat.prompt(text), chat.prompt("x")),
        (chat.prompt("x", f"x{text}"), chat.prompt("x", "x")),
        (chat.continuation([text, text]), chat.continuation(["x", "x"])),
    ]:
        assert [token for token in ids if token in control] == [token for token in harmless if token in control]
        assert text in chat.decode(ids)


def test_overlapping_control_tokens_are_all_broken() -> None:
    control = ["<<a>", "<a>", "a>>"]
    broken = break_control_tokens("<<a>><a>", control, "#")
    assert broken == "<#<#a#>><#a>"
    assert not any(token in piece for token in control for piece in broken.split("#"))
    assert break_control_tokens("<b>", control, "#") == "<b>"


def test_a_folder_is_loaded_as_it_was_made(tiny_model: Path) -> None:
    chat = load_chat_format(str(tiny_model), TOOLS)
    assert chat.prompt("How many?") == CHATS["tools"].prompt("How many?")
    assert chat.end_of_turn == CHATS["tiny"].end_of_turn


def test_folders_without_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model folder"):
        load_chat_format(str(tmp_path / "nowhere"))
    for model_type, reason in [("qwen3", "it has no tokenizer"), ("llama", "no tokenizer could be loaded")]:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        with pytest.raises(DataError, match=f"^{tmp_path}: {reason}"):
            load_chat_format(str(tmp_path))
    (tmp_path / "config.json").unlink()
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        load_chat_format(str(tmp_path))
