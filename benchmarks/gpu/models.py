"""Models of usual sizes with random weights: their config on disk and their tensors in memory. Nothing is
downloaded."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# The shapes of Qwen2.5 (arXiv:2412.15115), and small ones to try the scripts: the second can be divided into blocks of
# 128x128.
QWEN2 = {
    "0.5b": {"hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate_size": 4864},
    "1.5b": {"hidden_size": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "intermediate_size": 8960},
    "7b": {"hidden_size": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "intermediate_size": 18944},
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 128},
    "blocks-tiny": {"hidden_size": 256, "layers": 2, "heads": 8, "kv_heads": 4, "intermediate_size": 512},
}
# Mixtures of experts: the shape of Qwen3-30B-A3B (arXiv:2505.09388), half of its layers, a small one, one that is small
# but has thousands of tensors, and one that GPU kernels take and that is quickly written to files.
QWEN3_MOE = {
    "moe-30b": {"hidden_size": 2048, "layers": 48, "heads": 32, "kv_heads": 4, "experts": 128, "expert_size": 768},
    "moe-15b": {"hidden_size": 2048, "layers": 24, "heads": 32, "kv_heads": 4, "experts": 128, "expert_size": 768},
    "moe-tiny": {"hidden_size": 64, "layers": 8, "heads": 2, "kv_heads": 1, "experts": 64, "expert_size": 32},
    "moe-small": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "experts": 16, "expert_size": 128},
    "moe-deep-tiny": {"hidden_size": 64, "layers": 48, "heads": 2, "kv_heads": 1, "experts": 64, "expert_size": 32},
}


def write_config(size: str, folder: Path) -> Path:
    """Writes a model folder that an engine starts from with `load_format: dummy`. It has no weights and no
    tokenizer."""
    shape = {**QWEN2, **QWEN3_MOE}[size]
    config = {
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": 151936 if shape["hidden_size"] > 256 else 1024,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **(_experts(size) if size in QWEN3_MOE else _dense(size)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _dense(size: str) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "intermediate_size": QWEN2[size]["intermediate_size"],
        "tie_word_embeddings": size != "7b",
    }


def _experts(size: str) -> dict[str, object]:
    shape = QWEN3_MOE[size]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32 if size.endswith("tiny") else 128,
        "intermediate_size": 3 * shape["hidden_size"],
        "moe_intermediate_size": shape["expert_size"],
        "num_experts": shape["experts"],
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def moe_shapes(config: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of a mixture of experts as they are in a checkpoint, with each expert apart."""
    hidden, expert, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    heads, kv_heads = (config[name] * head for name in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{of}.{name}.weight", (hidden,)
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{of}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{of}.self_attn.o_proj.weight", (hidden, heads)
        for name in ("q_norm", "k_norm"):
            yield f"{of}.self_attn.{name}.weight", (head,)
        yield f"{of}.mlp.gate.weight", (config["num_experts"], hidden)
        for number in range(config["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                yield f"{of}.mlp.experts.{number}.{name}.weight", (expert, hidden)
            yield f"{of}.mlp.experts.{number}.down_proj.weight", (hidden, expert)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of the model's vocabulary. Each byte of a text is one token. transformers takes the class of
    Qwen's tokenizer for such a folder, whatever is written there, and that class reads nothing but byte-level BPE."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", *alphabet, *(f"w{number}" for number in range(len(alphabet) + 2, size))]
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def random_tensors(folder: Path, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """Returns every tensor of the model in `folder` in bfloat16. They have the names that transformers gives them, and
    for a mixture of experts those of a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    if "num_experts" in config:
        shapes = list(moe_shapes(config))
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return [(name, (torch.randn(shape, device=device) * 0.02).to(torch.bfloat16)) for name, shape in shapes]
