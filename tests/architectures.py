"""Tiny models of many architectures with random weights, as transformers makes them."""

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from millrace.train.tiny import make_tiny_tokenizer

MOE = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
# Maps the name of each architecture to the name of its class and the config values it needs beside the sizes below.
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 8, "num_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 8, "num_experts": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "glm4_moe": ("Glm4Moe", {**MOE, "head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 4, "pad_token_id": 0, "eos_token_id": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "phi3": ("Phi3", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}),
}
FUSED = ("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "deepseek_v3", "olmoe")


def make_model(architecture: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    name, extra = ARCHITECTURES[architecture]
    module = importlib.import_module(f"transformers.models.{architecture}")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config: PretrainedConfig = getattr(module, f"{name}Config")(**{**sizes, **extra, **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(module, f"{name}ForCausalLM")(config)
    return model


def make_moe_folder(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 32,
    architecture: str = "qwen3_moe",
    **changes: object,
) -> PreTrainedModel:
    """Makes a Qwen3-MoE, or a model of another architecture, that can be served and trained, with the tiny tokenizer
    and its chat template. Its heads and its experts have 32 elements, the fewest that vLLM's CPU kernels support.
    SGLang's GPU kernels need heads of 64."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": head_dim,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = make_model(architecture, **{**sizes, **changes}).to(dtype)
    model.save_pretrained(folder)
    return model


# Sizes that SGLang divides over two ranks without padding. Otherwise one of them would have nothing but zeros.
OVER_TWO: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 64}
