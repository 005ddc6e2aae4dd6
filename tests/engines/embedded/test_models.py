"""Models of transformers other than the one of the server tests, in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from millrace.engines.embedded.build import Settings, build
from millrace.engines.embedded.protocol import GenerateBody, SamplingBody, to_requests
from millrace.errors import ConfigError, DataError
from tests.engines.embedded.conftest import logprobs_of

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 100}


def settings(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "model": folder,
        "device": "cpu",
        "dtype": "float32",
        "max_running": 4,
        "cached_prefixes": 4,
        "context_length": None,
        "threads": None,
        "version": "0",
    }
    return Settings(**(values | changes))


def make(folder: Path, kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {**COMMON, "num_key_value_heads": 4, "tie_word_embeddings": False}),
        ("gpt2", {**GPT2, "bos_token_id": None, "eos_token_id": None}),  # learned positions
        ("mixtral", {**COMMON, "num_local_experts": 4}),
        (
            "gemma3_text",
            {**COMMON, "sliding_window": 128},
        ),  # two kinds of attention; the window is no shorter than the context
        ("gpt_oss", {**COMMON, "num_local_experts": 4, "sliding_window": 128}),  # attention sinks
        # Keys and values of different widths.
        ("deepseek_v3", {**COMMON, **LATENT, **EXPERTS, "num_key_value_heads": 4}),
    ],
)
def test_logprobs_are_those_of_a_full_forward(kind: str, config: Any, tmp_path: Path) -> None:
    model = make(tmp_path, kind, **config)
    core = build(settings(tmp_path))
    prompts = {"a": [1, 2, 3], "b": list(range(40)), "c": [*range(35), 7, 8], "d": [5] * 17, "e": [1, 2, 3, 4]}
    for rid, prompt in prompts.items():
        body = GenerateBody(
            input_ids=prompt, rid=rid, sampling_params=SamplingBody(max_new_tokens=12, ignore_eos=True, sampling_seed=1)
        )
        core.submit(to_requests(body, core.info, 0))
    while core.has_work:
        core.step()
    ended = {rid: output for rid, output in core.outbox if output.finish is not None}
    assert set(ended) == set(prompts)
    for rid, output in ended.items():
        assert output.logprobs == pytest.approx(logprobs_of(model, prompts[rid], output.output_ids), abs=1e-5)
    assert ended["c"].cached_tokens == 35  # 35 tokens come from the request that ran beside it


@pytest.mark.parametrize(
    ("kind", "config", "changes", "says"),
    [
        (
            "mamba",
            {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2},
            {"context_length": 64},
            "caches more",
        ),
        ("mamba", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}, {}, "--context-length"),
        ("mistral", {**COMMON, "sliding_window": 64}, {}, "at most 64"),
        ("llama", COMMON, {"context_length": 129}, "128"),
        ("llama", COMMON, {"device": "cuda"}, "CUDA"),
    ],
)
def test_an_unsupported_model_is_refused_at_the_start(
    kind: str, config: Any, changes: Any, says: str, tmp_path: Path
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    make(tmp_path, kind, **config)
    with pytest.raises(ConfigError, match=says):
        build(settings(tmp_path, **changes))


def test_a_window_as_long_as_the_context_is_no_window(tmp_path: Path) -> None:
    make(tmp_path, "mistral", **COMMON, sliding_window=64)
    assert build(settings(tmp_path, context_length=64)).info.context_length == 64


def test_a_file_that_changes_under_a_running_engine_does_not_change_its_weights(tmp_path: Path) -> None:
    """transformers maps the file into memory, and a trainer may write its next checkpoint over it."""
    make(tmp_path, "llama", **COMMON)
    core = build(settings(tmp_path))
    before = core.weights.checksums()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        content.write(bytes(1000))
    assert core.weights.checksums() == before
    assert build(settings(tmp_path)).weights.checksums() != before


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="config.json"):
        build(settings(tmp_path / "nothing"))
