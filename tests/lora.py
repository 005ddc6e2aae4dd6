"""LoRA adapters of a small model, and the model with an adapter merged into it."""

import copy

import torch
from transformers import PreTrainedModel

from millrace.types import LoraConfig

CONFIG = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))

NamedTensors = list[tuple[str, torch.Tensor]]


def lora(model: PreTrainedModel, seed: int, scale: float = 0.4) -> NamedTensors:
    """Makes a random adapter, strong enough to change the tokens of most prompts."""
    draw = torch.Generator().manual_seed(seed)
    tensors: NamedTensors = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in CONFIG.target_modules:
            a = torch.randn(CONFIG.rank, module.in_features, generator=draw) * scale
            b = torch.randn(module.out_features, CONFIG.rank, generator=draw) * scale
            tensors += [
                (f"base_model.model.{name}.lora_A.weight", a),
                (f"base_model.model.{name}.lora_B.weight", b),
            ]
    return tensors


def merged(model: PreTrainedModel, tensors: NamedTensors) -> PreTrainedModel:
    """Returns a copy of `model` with the adapter merged into its weights."""
    result, parts = copy.deepcopy(model), dict(tensors)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in parts:
                parameter += (
                    parts[f"{key}.lora_B.weight"] @ parts[f"{key}.lora_A.weight"] * (CONFIG.alpha / CONFIG.rank)
                )
    return result
