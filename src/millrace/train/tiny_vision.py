"""Tiny vision-language models with random weights, made by transformers' own classes.

The folders are like those of the real models: config, weights, tokenizer, chat template, and the configs of the image
processor and the video processor. Their vision tower takes patches of 14x14 or 16x16 pixels, as the real ones do, and
merges 2x2 of them to one token. So an image of 56x56 pixels is 4 tokens of a Qwen2.5-VL.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from millrace.train.tiny import make_tiny_tokenizer

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Qwen's layout of messages whose content is a text, or a list of texts and images.
CHAT_TEMPLATE = """
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".strip()
KINDS = ("qwen2_5_vl", "qwen3_vl")
# The number of pixels that an image is resized to have at least and at most.
SMALLEST, LARGEST = 56 * 56, 224 * 224


def make_tiny_vision_model(
    folder: Path, kind: str = "qwen2_5_vl", *, seed: int = 0, context_length: int = 512
) -> PreTrainedModel:
    """Make a tiny vision-language model in a new folder, and return it.

    kind: one of KINDS. The same seed gives the same weights.
    """
    tokenizer = make_tiny_vision_tokenizer()
    tokenizer.save_pretrained(folder)
    _write_processors(folder, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, tokenizer, context_length)
    model.save_pretrained(folder)
    return model


def make_tiny_vision_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with Qwen's vision tokens, and a chat template for images."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(kind: str, tokenizer: PreTrainedTokenizerFast, context_length: int) -> PreTrainedModel:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    # With larger weights than usual, the tokens after an image depend on it more than on rounding.
    scale: dict[str, Any] = {"initializer_range": 0.1}
    text = {
        **scale,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context_length,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {**scale, "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
    tokens = {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
        )
    text |= {"head_dim": 32, "rope_parameters": {**text["rope_parameters"], "mrope_interleaved": True}}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    )


def _write_processors(folder: Path, kind: str) -> None:
    """Write the configs of the processors, without torchvision, which the classes of the video processors need."""
    name, video, patch = {
        "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", 14),
        "qwen3_vl": ("Qwen3VL", "Qwen3VL", 16),
    }[kind]
    half = [0.5, 0.5, 0.5]
    values = {"image_mean": half, "image_std": half} if kind == "qwen3_vl" else {}
    size = {"shortest_edge": SMALLEST, "longest_edge": LARGEST}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, size=size, **values)
    config = {**json.loads(processor.to_json_string()), "processor_class": f"{name}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    video_config = {**config, "video_processor_type": f"{video}VideoProcessor"}
    del video_config["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video_config))
