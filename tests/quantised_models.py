"""Folders with quantised weights, and models whose sizes fit the blocks."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from millrace.train.tiny import make_tiny_tokenizer
from millrace.weights.recipes import FUSED, Recipe
from millrace.weights.rounding import largest_of, quantise
from tests.architectures import make_moe_folder

QUANTISED = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
# Forms whose config is ModelOpt's, with the name that it gives them.
MODELOPT = {"modelopt_mxfp8": "MXFP8", "modelopt_nvfp4": "NVFP4"}
INPUT_SCALE = {"nvfp4": "input_global_scale", "modelopt_nvfp4": "input_scale"}
# The smallest sizes that can be divided into blocks of 128x128. The heads have 32 elements, as in `tiny_model`.
DENSE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
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
    """Makes a Qwen2 in bfloat16 whose matrices have whole blocks of 128x128. It has biases, which stay as they are."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **DENSE)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
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
    if form in MODELOPT:
        fields = {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*mlp.gate"], "group_size": 16}
        return {"quant_method": "modelopt", "quantization": {"quant_algo": MODELOPT[form], **fields}}
    dynamic = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = {**dynamic, "type": "int"}
    kind = "int-quantized"
    if form == "fp8_channel":
        weights, inputs, kind = {**weights, "type": "float"}, {**dynamic, "type": "float"}, "float-quantized"
    elif form == "int4":
        weights = {**weights, "num_bits": 4, "strategy": "group", "group_size": 128}
        inputs, kind = None, "pack-quantized"
    elif form == "mxfp8":
        group_of_32 = {"strategy": "group", "group_size": 32, "type": "float", "scale_dtype": "torch.uint8"}
        weights, inputs, kind = {**weights, **group_of_32}, {**dynamic, **group_of_32}, "mxfp8-quantized"
    elif form in ("nvfp4", "nvfp4a16"):
        scales = {"strategy": "tensor_group", "group_size": 16, "type": "float", "scale_dtype": "torch.float8_e4m3fn"}
        weights, kind = {**weights, "num_bits": 4, **scales}, "nvfp4-pack-quantized"
        inputs = {**weights, "dynamic": "local"} if form == "nvfp4" else None
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
        case "mxfp8" | "modelopt_mxfp8":
            return Recipe("mxfp8", stem, shape, (1, 32), "weight_scale", (height, width // 32), "uint8")
    grid = height, width // 16
    whole: tuple[str, tuple[int, ...]] = ("weight_scale_2", ()) if form in MODELOPT else ("weight_global_scale", (1,))
    recipe = Recipe("nvfp4", stem, shape, (1, 16), "weight_scale", grid, "float8_e4m3fn", *whole)
    path, _, last = stem.removesuffix(".").rpartition(".")
    together = next((names for names in FUSED if last in names), (last,))
    inputs = {} if form == "nvfp4a16" else {f"{stem}{INPUT_SCALE[form]}": whole[1]}
    return replace(recipe, inputs=inputs, group=tuple(f"{path}.{name}." if path else f"{name}." for name in together))


def quantised_tensors(tensors: Iterable[tuple[str, torch.Tensor]], form: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with the linear layers of the decoder quantised."""
    found: dict[str, torch.Tensor] = {}
    given = dict(tensors)
    for name, tensor in given.items():
        if not QUANTISED.search(name):
            found[name] = tensor
            continue
        height, width = tensor.shape
        recipe = recipe_for(form, name, (height, width))
        group = [given[f"{stem}weight"] for stem in recipe.group]
        found |= quantise(tensor, recipe, largest_of(group) if group else None)
        # A power of two, by which an activation of one is exact.
        found |= {
            scale: torch.full(shape, 2.0**-8 if form in MODELOPT else 2.0**8) for scale, shape in recipe.inputs.items()
        }
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
