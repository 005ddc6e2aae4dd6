"""LoRA adapters: low-rank additions to the model's linear layers, chosen by each request.

A layer that an adapter changes gets a hook. It adds (alpha / r) B A x to the rows of a pass whose requests use the
adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle

from millrace.checksum import checksum
from millrace.engines.embedded.weights import UpdateRefused, byte_view
from millrace.model_folder import ADAPTER_CONFIG, ADAPTER_HALVES, ADAPTER_PREFIX, ADAPTER_TENSORS

# Features of PEFT that change the meaning of an adapter and are not supported.
FEATURES = (
    "use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layer_replication", "fan_in_fan_out", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors for one layer. a: [r, in]. b: [out, r]."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA adapter. pairs: by the layer's name. checksums: of each tensor in the file, by its name there."""

    scaling: float
    pairs: Mapping[str, Pair]
    checksums: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLora:
    """A loaded LoRA adapter. epoch: of the prefixes that it computes, unique to this load."""

    lora: Lora
    epoch: int


@dataclass(frozen=True, slots=True)
class Linears:
    """The model's linear layers, by name."""

    modules: Mapping[str, torch.nn.Linear]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: torch.nn.Module, *, dtype: torch.dtype, device: torch.device) -> "Linears":
        found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        return cls(found, dtype, device)

    def read(self, folder: Path) -> Lora:
        """Read an adapter in PEFT's format. Raises UpdateRefused if it can't be read or does not fit the model."""
        try:
            config: dict[str, Any] = orjson.loads((folder / ADAPTER_CONFIG).read_bytes())
            tensors = load_file(folder / ADAPTER_TENSORS)
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UpdateRefused(f"{folder} has no readable LoRA adapter: {error!r}") from error
        on = [name for name in FEATURES if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
        if on:
            raise UpdateRefused(f"{folder} needs {', '.join(on)}, which this engine does not support")
        modules = {name.removesuffix(end) for name in tensors for end in ADAPTER_HALVES if name.endswith(end)}
        if wrong := tensors.keys() ^ {module + end for module in modules for end in ADAPTER_HALVES}:
            raise UpdateRefused(f"{folder}: {min(wrong)} is not half of a pair, or its other half is missing")
        pairs = {module.removeprefix(ADAPTER_PREFIX): self._pair(module, tensors, rank) for module in modules}
        sums = {name: checksum(byte_view(tensor)) for name, tensor in tensors.items()}
        return Lora(alpha / rank, pairs, sums)

    def _pair(self, name: str, tensors: Mapping[str, torch.Tensor], rank: int) -> Pair:
        module = self.modules.get(name.removeprefix(ADAPTER_PREFIX))
        if module is None or not name.startswith(ADAPTER_PREFIX):
            raise UpdateRefused(f"the model has no linear layer {name}")
        a, b = (tensors[name + end] for end in ADAPTER_HALVES)
        shapes = (rank, module.in_features), (module.out_features, rank)
        if (tuple(a.shape), tuple(b.shape)) != shapes:
            raise UpdateRefused(f"{name}: A is {list(a.shape)} and B is {list(b.shape)}; they must be {shapes}")
        return Pair(a.to(self.device, self.dtype), b.to(self.device, self.dtype))


@dataclass(slots=True)
class Hooks:
    """The hooks that apply LoRA adapters. Used by the model thread only. rows: the adapter of each row of a pass."""

    linears: Linears
    rows: Sequence[Lora | None] = ()
    _hooked: dict[str, RemovableHandle] = field(default_factory=dict)

    def add(self, lora: Lora) -> None:
        for name in lora.pairs.keys() - self._hooked.keys():
            self._hooked[name] = self.linears.modules[name].register_forward_hook(self._hook(name))

    def clear(self) -> None:
        """Remove all hooks, so that the model runs at full speed."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def _hook(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            wanted = {lora: lora.pairs[name] for lora in self.rows if lora and name in lora.pairs}
            for lora, pair in wanted.items():
                count = len(self.rows)
                x, y = inputs[0].reshape(count, -1, pair.a.shape[1]), output.view(count, -1, pair.b.shape[0])
                if all(row is lora for row in self.rows):
                    y += (x @ pair.a.T @ pair.b.T) * lora.scaling
                else:
                    own = torch.tensor([i for i, row in enumerate(self.rows) if row is lora], device=x.device)
                    y.index_add_(0, own, (x[own] @ pair.a.T @ pair.b.T) * lora.scaling)
            return output

        return hook
