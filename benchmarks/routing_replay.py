"""Measures how far the trainer's logprobs of a mixture of experts are from the engine's, with and without replay.

    python -m benchmarks.routing_replay [--engine JSON] [--device cpu] [--size tiny] [--requests 32] [--tokens 128]

The model is a Qwen3-MoE with random weights in bfloat16. The engine computes in bfloat16, the trainer in that of
--dtype. `moved`: the share of a token's experts in a layer that the trainer's own routers do not choose.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.gpu.models import write_tokenizer
from millrace import GenerateRequest, SamplingParams, open_fleet
from millrace.config.engines import EngineConfig
from millrace.config.models import TrainConfig
from millrace.train.batch import TrainSample, make_microbatches
from millrace.train.policy import Policy, load_policy
from millrace.train.world import join_world

PROMPT = 32
TOKENS_PER_MICROBATCH = 8192
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
    },
    "large": {
        "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "head_dim": 64,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 384,
    },
}  # fmt: skip


def make_model(size: str, folder: Path, device: str) -> int:
    """Make the model on the device and return its vocabulary size. The weights are so large that experts and attention
    matter as much as the token itself, as in a trained model."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES[size],
        intermediate_size=SIZES[size]["moe_intermediate_size"],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.no_grad(), torch.device(device):
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        model.lm_head.weight.mul_(2)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return SIZES[size]["vocab_size"]


async def sample(
    engine: dict[str, Any], folder: Path, vocabulary: int, requests: int, tokens: int
) -> list[TrainSample]:
    """Generate with the engine, and return what it made as samples."""
    draw = np.random.default_rng(0)
    config: EngineConfig = TypeAdapter(EngineConfig).validate_python({**engine, "return_routed_experts": True})
    sampling = SamplingParams(tokens, ignore_eos=True)
    asked = [GenerateRequest(tuple(draw.integers(0, vocabulary, PROMPT)), sampling) for _ in range(requests)]
    async with open_fleet(config, folder, log_dir=folder / "logs") as fleet:
        made = await fleet.generate_all(asked, deadline=600.0)
    return [
        TrainSample(
            np.array(request.input_ids + one.output_ids),
            np.arange(PROMPT + tokens) >= PROMPT,
            np.concatenate([np.zeros(PROMPT, np.float32), one.logprobs]),
            0.0,
            routed_experts=one.routed_experts,
        )
        for request, one in zip(asked, made, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Gap:
    """|engine's logprob - trainer's| of the sampled tokens, in nats."""

    mean: float
    median: float
    largest: float


@torch.no_grad()
def gap(policy: Policy, samples: Sequence[TrainSample], *, replay: bool) -> Gap:
    """Return the gap of all samples."""
    found = []
    for batch in make_microbatches(samples, TOKENS_PER_MICROBATCH):
        here = batch.to(policy.world.device)
        experts = here.experts_BTLK if replay else None
        logprobs_BT = policy.token_logprobs(here.token_ids_BT, 1.0, experts_BTLK=experts).logprobs_BT
        found.append((logprobs_BT - here.engine_logprobs_BT).abs()[here.mask_BT].float())
    gaps = torch.cat(found)
    return Gap(gaps.mean().item(), gaps.median().item(), gaps.max().item())


@torch.no_grad()
def moved(policy: Policy, samples: Sequence[TrainSample]) -> float:
    """Return the share of the engine's choices of experts that the trainer's own routers do not make."""
    kept = total = 0
    for one in samples:
        assert one.routed_experts is not None
        rows, layers, chosen = one.routed_experts.shape
        ids = torch.from_numpy(one.token_ids)[None].to(policy.world.device)
        with policy._precision():
            routed = policy.model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        own = torch.stack([logits.topk(chosen).indices for logits in routed], dim=1)[:rows].cpu()
        theirs = torch.from_numpy(one.routed_experts.astype(np.int64))
        kept += int((theirs.unsqueeze(-1) == own.unsqueeze(-2)).sum())
        total += rows * layers * chosen
    return 1 - kept / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=json.loads, default={"kind": "sglang", "device": "cpu", "threads": 1})
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, join_world(asked.device) as world:
        folder = Path(name)
        vocabulary = make_model(asked.size, folder, asked.device)
        samples = asyncio.run(sample(asked.engine, folder, vocabulary, asked.requests, asked.tokens))
        policy = load_policy(folder, TrainConfig(steps=1, lr=1e-6, dtype=asked.dtype), world)
        experts = samples[0].routed_experts
        assert experts is not None
        print(f"{sum(one.trained_tokens for one in samples)} tokens, {experts[0].nbytes} bytes of experts a token")
        print(f"moved: {moved(policy, samples):.3%} of the engine's choices")
        for replay in (False, True):
            found = gap(policy, samples, replay=replay)
            print(
                f"{'with' if replay else 'without'} replay: mean {found.mean:.5f}, median {found.median:.5f}, "
                f"largest {found.largest:.4f} nats"
            )


if __name__ == "__main__":
    main()
