"""Build an engine from its settings."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from millrace.engines.embedded.cache import SlotCache
from millrace.engines.embedded.core import Core
from millrace.engines.embedded.lora import Hooks, Linears
from millrace.engines.embedded.runner import Runner, load_model
from millrace.engines.embedded.weights import WeightStore
from millrace.errors import ConfigError, DataError
from millrace.model_config import compute_dtype
from millrace.model_folder import has_weights, stored_tensors


@dataclass(frozen=True, slots=True)
class Settings:
    """The engine's settings, from the command line. None leaves the choice to the model or to torch."""

    model: Path
    device: str
    dtype: str
    max_running: int
    cached_prefixes: int
    context_length: int | None
    threads: int | None
    version: str


def build(settings: Settings) -> Core:
    """Load the model and allocate the KV cache. Raises DataError or ConfigError, which say what to change."""
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if not (settings.model / "config.json").is_file():
        raise DataError(f"{settings.model} has no config.json; --model takes a folder in Hugging Face's format")
    named = compute_dtype(settings.dtype, settings.model)
    dtype: torch.dtype = getattr(torch, "float32" if named == "auto" else named)
    transformers_logging.disable_progress_bar()  # stderr is a log
    model, info, layers = load_model(settings.model, device=device, dtype=dtype, context_length=settings.context_length)
    cache = SlotCache(
        layers,
        running=settings.max_running,
        stored=settings.cached_prefixes,
        context_length=info.context_length,
        dtype=dtype,
        device=device,
    )
    hooks = Hooks(Linears.of(model, dtype=dtype, device=device))
    runner = Runner(model, cache, hooks, device=device, dtype=dtype)
    runner.warm_up()
    stored = stored_tensors(settings.model).keys() if has_weights(settings.model) else None
    weights = WeightStore(model, stored)
    info = replace(info, unusual_dtypes=weights.unlike(dtype))
    return Core(info, runner, cache, weights, max_running=settings.max_running, version=settings.version)
