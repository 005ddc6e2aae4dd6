"""The demo's model folder and its warm-up data are reproducible and readable, and the data has the layout of a
rollout."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from millrace.config.sources import TinyModelConfig
from millrace.rollout.agent import EpisodeLimits, Generate, run_episode
from millrace.rollout.chat import load_chat_format
from millrace.rollout.problems import make_misread_story, make_story
from millrace.rollout.tools import Calculator
from millrace.train.tiny import make_tiny_model, make_tiny_tokenizer
from millrace.train.warmup_data import SupervisedConversation, warmup_conversations
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams, VersionSpan

TOKENIZER = make_tiny_tokenizer()
CONFIG = TinyModelConfig(kind="tiny", hidden_size=32, heads=2)


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), held_out=st.booleans())
def test_the_demos_texts_take_a_token_a_word_and_a_token_a_digit(seed: int, held_out: bool) -> None:
    question = make_story(seed, 0, held_out=held_out).question
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(question))
    assert len(tokens) <= len(question.split()) * 2
    assert all(len(token) == 1 for token in tokens if any(char.isdigit() for char in token))


def test_the_same_seed_makes_the_same_files_and_another_seed_other_weights(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        make_tiny_model(CONFIG, seed, tmp_path / name)
    assert torch.equal(state, torch.random.get_rng_state())
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    differing = {name for name in files["a"] if files["a"][name] != files["c"][name]}
    assert differing == {"model.safetensors"}


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    make_tiny_model(CONFIG, 0, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    ids = torch.tensor([tokenizer.encode("Tom has 12 cards.")])
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def repeat(conversation: SupervisedConversation) -> Generate:
    """A model that says the conversation's turns, after checking that each was asked for in its place."""

    async def generate(request: GenerateRequest) -> Generation:
        start = len(request.input_ids)
        assert request.input_ids == conversation.token_ids[:start]
        stop = start + int(np.argmin(np.append(conversation.loss_mask[start:], False)))
        turn = conversation.token_ids[start:stop]
        logprobs, version_spans = np.zeros(len(turn), np.float32), (VersionSpan(0, 0, len(turn)),)
        return Generation(request.request_id, turn, logprobs, FinishReason.STOP, version_spans, start, 0)

    return generate


async def test_a_warmup_conversation_is_token_for_token_a_rollout(tiny_model: Path) -> None:
    """Plays each conversation again with a model that says its turns, and expects the same tokens."""
    tool = Calculator()
    chat = load_chat_format(str(tiny_model), [tool.schema])
    for conversation in warmup_conversations(chat, seed=3, start=10, count=20):
        ids, mask = conversation.token_ids, conversation.loss_mask
        prompt = ids[: int(np.argmax(mask))]
        limits = EpisodeLimits(max_turns=4, max_turn_tokens=48, max_sample_tokens=256, context_length=256)
        episode = await run_episode(
            "s", prompt, generate=repeat(conversation), chat=chat, tools={tool.name: tool}, limits=limits,
            sampling=SamplingParams(48), on_tool_answer=lambda answer: None,
        )  # fmt: skip
        assert episode.token_ids == ids
        np.testing.assert_array_equal(episode.loss_mask, mask)
        assert max(np.diff(np.flatnonzero(np.diff(mask.astype(int))))) <= 48


def test_the_warmup_stream_can_be_taken_in_parts(tiny_model: Path) -> None:
    chat = load_chat_format(str(tiny_model))
    whole = list(warmup_conversations(chat, 1, 0, 6))
    parts = [c for start in (0, 2, 4) for c in warmup_conversations(chat, 1, start, 2)]
    assert [c.token_ids for c in whole] == [c.token_ids for c in parts]


def test_the_warmup_copies_its_numbers_and_results(tiny_model: Path) -> None:
    chat = load_chat_format(str(tiny_model))
    conversations = list(warmup_conversations(chat, 1, 0, 200))
    for index, conversation in enumerate(conversations):
        story, text = make_misread_story(1, index), chat.decode(conversation.token_ids)
        left = story.numbers[0]
        for operator, number, result in zip(story.operators, story.numbers[1:], story.results(), strict=True):
            assert f'"expression": "{left} {operator} {number}"' in text
            assert f"<tool_response>\n{result}\n" in text
            left = result
        assert text.endswith(f"#### {left}<|im_end|>")
