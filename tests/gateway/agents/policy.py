"""A small model that plays agents: it writes turns that a test has chosen, each with a probability.

It is a Qwen3 whose next token depends mostly on the last one, and a little on all tokens before. Turns are cut into
tokens that are in nothing else, so each of them leads to the next. A whole prompt of an agent takes it seconds on a CPU
core, and training makes a turn more or less likely.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.rollout.test_templates import source

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PIECE = 24  # characters of a turn in one token
VOCABULARY = 4000
HIDDEN = 64
CERTAIN = 24.0  # logit of the token that follows
DOCS = Path(__file__).parents[3] / "docs"


def make_policy(folder: Path, turns: Sequence[str], *, context_length: int = 65536) -> None:
    """Writes the model to a new folder. Each of the turns is as likely as those beside it, up to a few percent."""
    tokenizer = _tokenizer()
    written = [[turn[at : at + PIECE] for at in range(0, len(turn), PIECE)] for turn in turns]
    pieces = dict.fromkeys(piece for turn in written for piece in turn)
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    tokenizer.save_pretrained(folder)
    question = [{"role": "user", "content": "?"}]
    start = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(tokenizer, context_length)
        with torch.no_grad():
            _teach(model, start, [tokenizer.convert_tokens_to_ids(turn) for turn in written], tokenizer.eos_token_id)
    model.save_pretrained(folder)


def _teach(model: Qwen3ForCausalLM, start: int, turns: Sequence[Sequence[int]], end: int) -> None:
    """Sets what follows which token."""
    known = torch.nn.functional.normalize(model.model.embed_tokens.weight.normal_(), dim=-1)
    model.model.embed_tokens.weight.copy_(known * HIDDEN**0.5)
    model.lm_head.weight.zero_()
    pairs = {pair for turn in turns for pair in pairwise([start, *turn, end])}
    for before, after in sorted(pairs):
        model.lm_head.weight[after] += CERTAIN / HIDDEN**0.5 * known[before]


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((page.read_text() for page in sorted(DOCS.glob("*.md"))), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = source("qwen3")
    return tokenizer


def _model(tokenizer: PreTrainedTokenizerFast, context_length: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=context_length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
