"""Models of usual sizes with random weights: their config on disk and their tensors in memory. Nothing is
downloaded."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# The shapes of Qwen2.5 (arXiv:2412.15115), and a small one to try the scripts.
QWEN2 = {
    "0.5b": {"hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate_size": 4864},
    "1.5b": {"hidden_size": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "intermediate_size": 8960},
    "7b": {"hidden_size": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "intermediate_size": 18944},
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 128},
}


def write_config(size: str, folder: Path) -> Path:
    """Writes a model folder that an engine starts from with `load_format: dummy`. It has no weights and no
    tokenizer."""
    shape = QWEN2[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "intermediate_size": shape["intermediate_size"],
        "vocab_size": 1024 if size == "tiny" else 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": size != "7b",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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
    """Returns every tensor of the model in `folder` in bfloat16, with the names that transformers gives them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return [
        (name, (torch.randn(parameter.shape, device=device) * 0.02).to(torch.bfloat16))
        for name, parameter in model.named_parameters()
    ]
