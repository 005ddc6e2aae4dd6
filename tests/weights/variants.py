"""Variants of weights to publish. Each is also a model folder. Servers started from it give the reference tokens."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from millrace.config.engines import EngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, Generation, SamplingParams

Prompt = tuple[int, ...]
NamedTensor = tuple[str, torch.Tensor]

# The last prompt is longer than a block of any engine's prefix cache.
PROMPTS: tuple[Prompt, ...] = ((5, 17, 300), tuple(range(30, 80)), tuple((7 * i * i + 3) % 400 for i in range(140)))
LONG, SHORT = 64, 12  # tokens
# Scales the inner weights. Otherwise the tied embedding would make every variant repeat the last token.
LOUDER = 4.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of weights, as tensors and as a model folder."""

    folder: Path
    tensors: tuple[NamedTensor, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The greedy tokens that a server makes for each prompt."""

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


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model's folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def louder(tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
    """Scales the inner weights. A new small model just repeats the last token of the prompt."""
    return [(name, tensor * LOUDER if ".layers." in name and tensor.ndim == 2 else tensor) for name, tensor in tensors]


async def greedy(engine: Engine, prompt: Prompt, name: str, tokens: int, *, deadline: float = 30.0) -> Generation:
    return await engine.generate(greedy_request(prompt, name, tokens), deadline=deadline)


def greedy_request(prompt: Prompt, name: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(tokens, temperature=0.0, ignore_eos=True), request_id=name)


def greedy_tokens(folder: Path, tensors: Mapping[str, torch.Tensor], prompt: Prompt, count: int) -> tuple[int, ...]:
    """Returns the greedy tokens of the transformers model of `folder` with these weights, which its file gets."""
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    made = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return tuple(made[0, len(prompt) :].tolist())


async def ask(engine: Engine) -> Tokens:
    return Tokens({prompt: (await greedy(engine, prompt, "reference", LONG)).output_ids for prompt in PROMPTS})


async def ask_server(config: EngineConfig, variant: Variant, logs: Path) -> Tokens:
    """Starts a server from the variant's folder, asks it for its tokens, and ends it."""
    started = await start(config, LaunchSpec(model_path=variant.folder, log_dir=logs))
    try:
        return await ask(started.engine)
    finally:
        await started.end()


async def ask_servers(config: EngineConfig, variants: Sequence[Variant], logs: Path) -> list[Tokens]:
    """Asks one server for each variant."""
    config = config.model_copy(update={"replicas": 1})
    asked = (ask_server(config, variant, logs / variant.folder.name) for variant in variants)
    return list(await asyncio.gather(*asked))


def require_distinct(references: Sequence[Tokens]) -> None:
    """Requires that the variants make different tokens, so that an engine with the wrong variant is noticed."""
    for prompt in PROMPTS:
        assert len({tokens[prompt][:SHORT] for tokens in references}) == len(references)
