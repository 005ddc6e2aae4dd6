"""A LoRA adapter as a folder in PEFT's format, which SGLang, vLLM and the embedded engine read."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.checksum import tensor_checksum
from millrace.errors import PublishError
from millrace.model_folder import ADAPTER_CONFIG, ADAPTER_HALVES, ADAPTER_PREFIX, ADAPTER_TENSORS, to_disk
from millrace.types import LoraConfig

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WrittenLora:
    """An adapter that was written to the folder `path`.

    name: its name in the engines. No other adapter of this run or an earlier one has this name, because engines cache
        prefixes by it.
    checksums: the checksum of each tensor by name (`millrace.checksum`).
    nbytes: the size of all tensors.
    """

    name: str
    version: int
    path: Path
    checksums: Mapping[str, str]
    nbytes: int


def check_lora(shapes: Mapping[str, Shape], config: LoraConfig, base: Mapping[str, Shape] | None) -> None:
    """Raise PublishError if these are not the tensors of an adapter for the model.

    shapes: the shape of each tensor of the adapter, by name.
    config: the adapter's config.
    base: the shape of each tensor of the model, by name; None if they are unknown.

    SGLang silently ignores tensors that it does not know, so they are refused here.
    """
    if config.rank < 1 or config.alpha <= 0:
        raise PublishError(
            f"an adapter needs a rank of at least 1 and an alpha above 0, not {config.rank} and {config.alpha}"
        )
    if not shapes:
        raise PublishError("the adapter has no tensors")
    modules = set()
    for name in shapes:
        end = next((end for end in ADAPTER_HALVES if name.endswith(end)), None)
        if end is None or not name.startswith(ADAPTER_PREFIX):
            raise PublishError(
                f"{name} is not a name that PEFT uses: {ADAPTER_PREFIX}MODULE{ADAPTER_HALVES[0]} or {ADAPTER_HALVES[1]}"
            )
        modules.add(name.removesuffix(end))
    for module in sorted(modules):
        if missing := [module + end for end in ADAPTER_HALVES if module + end not in shapes]:
            raise PublishError(f"{missing[0]} is missing; every module needs a lora_A and a lora_B")
        a, b = (shapes[module + end] for end in ADAPTER_HALVES)
        _check_pair(module.removeprefix(ADAPTER_PREFIX), a, b, config, base)
    for target in config.target_modules:
        if not any(_is(module, target) for module in modules):
            raise PublishError(f"target_modules names {target}, but it has no tensor")


def _check_pair(module: str, a: Shape, b: Shape, config: LoraConfig, base: Mapping[str, Shape] | None) -> None:
    if not any(_is(module, target) for target in config.target_modules):
        raise PublishError(f"{module} is not among the target_modules: {', '.join(config.target_modules)}")
    if len(a) != 2 or len(b) != 2 or a[0] != config.rank or b[1] != config.rank:
        raise PublishError(
            f"{module}: lora_A is {list(a)} and lora_B {list(b)}, but with rank {config.rank} they must be "
            f"[{config.rank}, in] and [out, {config.rank}]"
        )
    if base is None:
        return
    shape = base.get(f"{module}.weight")
    if shape is None:
        raise PublishError(f"the model has no {module}.weight, but the adapter has tensors for it")
    if shape != (b[0], a[1]):
        raise PublishError(f"{module}.weight is {list(shape)}, but the adapter's is {[b[0], a[1]]}")


def _is(module: str, target: str) -> bool:
    """Return whether the target of the config names the module."""
    return module == target or module.endswith(f".{target}")


def check_values(tensors: "Mapping[str, torch.Tensor]") -> None:
    """Raise PublishError if a tensor has a dtype that an adapter can't have."""
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise PublishError(f"{name} is {tensor.dtype}; an adapter is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


def lora_folder(place: Path, version: int) -> Path:
    """Return the folder of the adapter that belongs to `version`."""
    return place / f"adapter-{version:08d}"


def write_lora(
    place: Path, name: str, version: int, tensors: "Mapping[str, torch.Tensor]", config: LoraConfig
) -> WrittenLora:
    """Write the adapter to a folder below `place`. The folder is created, or replaced, when all of it is on the disk.
    Raises PublishError if it can't be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = lora_folder(place, version)
    partial = place / f".{path.name}.partial"
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / ADAPTER_CONFIG).write_text(json.dumps(peft_config(config)))
        save_file(copies, partial / ADAPTER_TENSORS, metadata={"format": "pt"})
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors makes it private, but engines may run as another user
            to_disk(file)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        to_disk(place)
    except (OSError, SafetensorError) as error:
        raise PublishError(f"{path} can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    checksums = {key: tensor_checksum(tensor) for key, tensor in copies.items()}
    return WrittenLora(name, version, path, checksums, sum(tensor.nbytes for tensor in copies.values()))


def peft_config(config: LoraConfig) -> dict[str, object]:
    """Return the parts of adapter_config.json that PEFT and the engines need."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # as PEFT writes it
        "lora_dropout": 0.0,
        "target_modules": list(config.target_modules),
        "bias": "none",
    }


def sweep(place: Path, keep: Collection[Path | None]) -> None:
    """Remove the adapters below `place` that are not in `keep`, including those of a run that was killed."""
    for path in place.glob("adapter-" + "[0-9]" * 8):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
