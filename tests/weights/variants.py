"""Weights to publish, each also a folder, and what a server makes that was started from that folder."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from millrace.config.models import EngineConfig, TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, Generation, SamplingParams

Prompt = tuple[int, ...]
NamedTensor = tuple[str, torch.Tensor]

# The last is longer than a block of any engine's prefix cache.
PROMPTS: tuple[Prompt, ...] = ((5, 17, 300), tuple(range(30, 80)), tuple((7 * i * i + 3) % 400 for i in range(140)))
LONG, SHORT = 64, 12  # tokens
# What tells the variants apart has to weigh more than the token itself, which the tied embedding would bring back.
LOUDER = 4.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of weights; the folder has the same."""

    folder: Path
    tensors: tuple[NamedTensor, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The greedy ones that a server makes, by the prompt."""

    made: Mapping[Prompt, tuple[int, ...]] = field(repr=False)

    def __getitem__(self, prompt: Prompt) -> tuple[int, ...]:
        return self.made[prompt]


def make_variants(place: Path, count: int, *, context_length: int = 256) -> list[Variant]:
    config = TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=context_length)
    variants = []
    for seed in range(count):
        folder = place / f"variant-{seed}"
        make_tiny_model(config, seed, folder)
        tensors = dict(louder(load_file(folder / "model.safetensors").items()))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        variants.append(Variant(folder, tuple(tensors.items())))
    return variants


def louder(tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
    """Weights that make other tokens than the first ones of a small model, which repeat the prompt's last."""
    return [(name, tensor * LOUDER if ".layers." in name and tensor.ndim == 2 else tensor) for name, tensor in tensors]


async def greedy(engine: Engine, prompt: Prompt, name: str, tokens: int, *, deadline: float = 30.0) -> Generation:
    return await engine.generate(greedy_request(prompt, name, tokens), deadline=deadline)


def greedy_request(prompt: Prompt, name: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(tokens, temperature=0.0, ignore_eos=True), request_id=name)


async def ask(engine: Engine) -> Tokens:
    return Tokens({prompt: (await greedy(engine, prompt, "reference", LONG)).output_ids for prompt in PROMPTS})


async def ask_server(config: EngineConfig, variant: Variant, logs: Path) -> Tokens:
    """What a server makes that is started from the variant's folder, and ended when it has answered."""
    started = await start(config, LaunchSpec(model_path=variant.folder, log_dir=logs))
    try:
        return await ask(started.engine)
    finally:
        await started.end()


async def ask_servers(config: EngineConfig, variants: Sequence[Variant], logs: Path) -> list[Tokens]:
    """One server for each variant."""
    config = config.model_copy(update={"replicas": 1})
    asked = (ask_server(config, variant, logs / variant.folder.name) for variant in variants)
    return list(await asyncio.gather(*asked))


def require_distinct(references: Sequence[Tokens]) -> None:
    """Whoever serves another variant than it should is seen by its tokens."""
    for prompt in PROMPTS:
        assert len({tokens[prompt][:SHORT] for tokens in references}) == len(references)
