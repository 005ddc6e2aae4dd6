"""A small Qwen3 with random weights, a tokenizer and a chat template, as a folder in Hugging Face's format.

The tokenizer is built like Qwen's (byte-level BPE, one token a digit, `<|im_start|>` and `<tool_call>` as added
tokens), but its vocabulary has only the words of the problem generator. So a prompt has about fifty tokens. Other text
is encoded byte by byte.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from millrace.config.sources import TinyModelConfig
from millrace.rollout.problems import make_story

# How a text is split into words before BPE. Letters include the space before them, each digit is a word (as in Qwen),
# and all characters between letters and digits are one word, spaces included. So the word before a number always shows
# where the number belongs, and small models learn to copy numbers in half the steps that Qwen's split takes.
_WORDS = r" ?\p{L}+|\p{N}|[^\r\n\p{L}\p{N}]+?(?= \p{L})|[^\r\n\p{L}\p{N}]+|[\r\n]+"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CALL_TEXT = (
    "{clause}: {operator}\n"
    '<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{left} {operator} {right}"}}}}\n</tool_call>'
)
ANSWER_TEXT = "#### {answer}"

# Qwen's layout. It has the tools' names only: their full schemas would be longer than the problems.
CHAT_TEMPLATE = """
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}{% endif %}
{%- if tools %}{% set ns.system = ns.system + 'Tools: ' + tools | map(attribute='function.name') | join(', ') %}{%
endif %} {%- if ns.system %}{{ '<|im_start|>system\\n' + ns.system + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message.role != 'system' %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".strip()


def make_tiny_model(config: TinyModelConfig, seed: int, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template to a new folder. The same seed gives the same bytes."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_model_config(config, tokenizer))
    model.save_pretrained(folder)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with its chat template. It is deterministic."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than the corpus needs, so that each of its words becomes one token
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in _MARKUP])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    """Return texts with every word of the demo's conversations."""
    texts = ["<|im_start|>system\nTools: calculator<|im_end|>\nuser\nassistant\n tool Error", "#### 1"]
    for story in (make_story(0, index) for index in range(2000)):
        texts.append(story.question)
        steps = zip(story.clauses, story.operators, strict=True)
        texts += [CALL_TEXT.format(clause=clause, operator=operator, left=1, right=1) for clause, operator in steps]
    return texts


def _model_config(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
