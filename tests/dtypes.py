"""Model folders in other dtypes than float32."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_as(
    folder: Path,
    place: Path,
    dtype: torch.dtype,
    *,
    key: str | None = "dtype",
    unusual: Mapping[str, torch.dtype] | None = None,
) -> Path:
    """Saves the model in `folder` to `place` in another dtype. The config names it under `key`, or not at all with
    None. The tensors in `unusual` have dtypes of their own."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    if key is not None:
        config[key] = str(dtype).removeprefix("torch.")
    (place / "config.json").write_text(json.dumps(config))
    tensors = load_file(place / "model.safetensors")
    cast = {name: tensor.to((unusual or {}).get(name, dtype)) for name, tensor in tensors.items()}
    save_file(cast, place / "model.safetensors", metadata={"format": "pt"})
    return place
