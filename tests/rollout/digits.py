"""A judge that answers with numbers, which depend on its prompt."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from millrace.config.sources import TinyModelConfig
from millrace.rollout.chat import load_prompt_format
from millrace.train.tiny import make_tiny_model


def make_judge_model(folder: Path) -> None:
    """Makes a judge from random weights. Digits are likely, and the prompt outweighs the last token."""
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 7, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    digits = load_prompt_format(str(folder)).tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        model.get_input_embeddings().weight[digits] *= 3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 100
            layer.mlp.down_proj.weight *= 100
    model.save_pretrained(folder)
