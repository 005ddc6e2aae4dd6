"""Folders with quantised weights, and models whose sizes fit the blocks."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from millrace.train.tiny import make_tiny_tokenizer
from millrace.weights.quantised import Recipe, quantise
from tests.architectures import make_moe_folder

QUANTISED = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
# The smallest sizes that can be divided into blocks of 128x128. The heads have 32 elements, as in `tiny_model`.
DENSE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 4,
    "moe_intermediate_size": 128,
}


def make_dense_folder(folder: Path, seed: int = 0) -> PreTrainedModel:
    """Makes a Qwen3 in bfloat16 whose matrices have whole blocks of 128x128."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **DENSE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def make_moe(folder: Path, seed: int = 0) -> PreTrainedModel:
    """Makes a Qwen3-MoE in bfloat16 whose matrices have whole blocks of 128x128."""
    return make_moe_folder(folder, dtype=torch.bfloat16, seed=seed, **MOE)


def config_of(form: str) -> dict[str, Any]:
    """The `quantization_config` of a folder in this form."""
    if form in ("fp8_block", "fp8_tensor"):
        sizes = {"weight_block_size": [128, 128]} if form == "fp8_block" else {}
        return {"quant_method": "fp8", "activation_scheme": "dynamic", **sizes}
    dynamic = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = {**dynamic, "type": "int"}
    kind = "int-quantized"
    if form == "fp8_channel":
        weights, inputs, kind = {**weights, "type": "float"}, {**dynamic, "type": "float"}, "float-quantized"
    elif form == "int4":
        weights = {**weights, "num_bits": 4, "strategy": "group", "group_size": 128}
        inputs, kind = None, "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


def recipe_for(form: str, name: str, shape: tuple[int, int]) -> Recipe:
    """How a matrix is quantised in this form."""
    stem, (height, width) = name.removesuffix("weight"), shape
    match form:
        case "fp8_block":
            grid = -(-height // 128), -(-width // 128)
            return Recipe("fp8", stem, shape, (128, 128), "weight_scale_inv", grid, "float32")
        case "fp8_tensor":
            return Recipe("fp8", stem, shape, shape, "weight_scale", (), "float32")
        case "fp8_channel":
            return Recipe("fp8", stem, shape, (1, width), "weight_scale", (height, 1), "float32")
        case "int8":
            return Recipe("int8", stem, shape, (1, width), "weight_scale", (height, 1), "float32")
        case "int4":
            return Recipe("int4", stem, shape, (1, 128), "weight_scale", (height, width // 128), "bfloat16")
    raise ValueError(form)


def quantised_tensors(tensors: Iterable[tuple[str, torch.Tensor]], form: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with the linear layers of the decoder quantised."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if QUANTISED.search(name):
            height, width = tensor.shape
            found |= quantise(tensor, recipe_for(form, name, (height, width)))
        else:
            found[name] = tensor
    return found


def save_quantised(source: Path, place: Path, form: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Saves the model in `source` to `place` in this form, or another one of its shapes with these `tensors`."""
    shutil.copytree(source, place)
    given = load_file(source / "model.safetensors") if tensors is None else tensors
    content = {name: tensor.contiguous() for name, tensor in quantised_tensors(given.items(), form).items()}
    save_file(content, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(form)}))
    return place
