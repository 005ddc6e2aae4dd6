"""Small models, configs and samples for the trainer's tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from millrace.config.models import LossConfig, TrainConfig
from millrace.train.batch import TrainSample
from millrace.train.policy import Policy, load_policy
from millrace.train.trainer import Trainer
from millrace.train.world import World

VOCABULARY = 48
CPU = World(torch.device("cpu"))


def make_model(folder: Path, *, hidden_size: int = 64, tied: bool = True, dropout: float = 0.0) -> Path:
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_samples(count: int, *, seed: int = 0) -> list[TrainSample]:
    """Makes conversations of different lengths. A few of them have no trained token."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(3, 17))
        mask = rng.random(length) < (0.0 if index % 5 == 4 else 0.7)
        mask[0] = False
        logprobs = rng.normal(-3.5, 0.5, length).astype(np.float32)
        samples.append(TrainSample(rng.integers(0, VOCABULARY, length), mask, logprobs, float(rng.normal())))
    return samples


# A constant rate without weight decay, for tests of the gradients alone.
PLAIN = {"weight_decay": 0.0, "lr_schedule": "constant", "lr_warmup_steps": 0}


def make_config(**changes: object) -> TrainConfig:
    base = TrainConfig(
        steps=10,
        lr=1e-3,
        weight_decay=0.1,
        lr_schedule="cosine",
        lr_warmup_steps=1,
        loss=LossConfig(importance_cap=1.5),
        tokens_per_microbatch=40,
    )
    return TrainConfig.model_validate({**dict(base), **changes})


def make_policy(folder: Path, config: TrainConfig, world: World = CPU) -> Policy:
    return load_policy(folder, config, world)


def make_trainer(folder: Path, config: TrainConfig, world: World = CPU) -> Trainer:
    return Trainer(make_policy(folder, config, world), config)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in policy.named_tensors()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def plain_logprobs(model: torch.nn.Module, token_ids: Sequence[int], temperature: float) -> torch.Tensor:
    """Returns the logprob of each token but the first, by transformers' own forward pass and with gradient: [T - 1]."""
    logits_TV = model(input_ids=torch.tensor([list(token_ids)])).logits[0, :-1] / temperature
    targets_T = torch.tensor(list(token_ids)[1:])
    return torch.log_softmax(logits_TV.float(), dim=-1)[torch.arange(len(targets_T)), targets_T]
