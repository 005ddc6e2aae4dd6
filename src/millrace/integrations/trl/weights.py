"""The weights of a trained model under its checkpoint's names, with LoRA adapters merged."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from millrace.errors import ConfigError
from millrace.weights.sharded import ShardedTensors


def check_publishable(model: Any) -> None:
    """Raise ConfigError if `whole_weights` can't give the model's weights."""
    if getattr(model, "is_quantized", False):
        raise ConfigError("the model is quantised, so its weights are not those of its folder; load it without")
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA" or config.use_dora or config.lora_bias or config.target_parameters:
            raise ConfigError(
                f"the adapter {name} ({kind}) can't be published: only LoRA adapters of linear layers and embeddings "
                "can, without use_dora, lora_bias and target_parameters"
            )
    if model.config.get_text_config().tie_word_embeddings and hasattr(model.get_input_embeddings(), "base_layer"):
        raise ConfigError("an adapter of embeddings that are tied to the head can't be published; adapt other layers")


def shards(model: Any) -> ShardedTensors | None:
    """Return the parameters of a model that is sharded over ranks (FSDP 2); None for a model that is not."""
    parameters = dict(model.named_parameters())
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    return ShardedTensors(parameters) if sharded else None


def whole_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and values of a model's parameters.

    Active LoRA adapters are added to the weights that they adapt, in copies: the model does not change.
    """
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()
        return
    for name, parameter in model.named_parameters():
        if "original_module" in name or f".{model.prefix}" in name:
            continue  # the weights that `modules_to_save` replaces, and the adapters' own
        layer, _, leaf = name.rpartition(".base_layer.")
        tensor = parameter.detach()
        if layer and leaf == "weight":
            tensor = _adapted(model.get_submodule(layer), tensor)
        for adapter in model.active_adapters:
            name = name.replace(f".modules_to_save.{adapter}.", ".")
        yield name, tensor


def _adapted(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    if layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
    return weight
