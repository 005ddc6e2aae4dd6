"""A model's folder in Hugging Face's format, read without torch: what its tensors are called and where their bytes
lie."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from millrace.errors import DataError

HEADER_LENGTH_BYTES = 8
# safetensors' names of the floats that can be cast to each other, and torch's.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# An adapter's folder in PEFT's format: its files, and what the names of its tensors begin and end with.
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
ADAPTER_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, at `begin:end` of its bytes. dtype is safetensors' name, as in `BF16`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def float_dtype(self) -> str | None:
        """torch's name of the dtype, if it is a float that can be cast to another without a scale."""
        return FLOATS.get(self.dtype)


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor in the folder's safetensors files, by name.

    The format (a little-endian length, a JSON header, the bytes) is that of https://github.com/huggingface/safetensors.
    Raises DataError when the folder has no such file or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors file; give a model's folder in Hugging Face's format")
    return {name: tensor for path in files for name, tensor in _read(path).items()}


def _read(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if length > size:
                raise ValueError("its header is cut off")
            header = orjson.loads(file.read(length))
        start = HEADER_LENGTH_BYTES + length
        tensors = {
            name: StoredTensor(
                path, entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        if any(tensor.end > size for tensor in tensors.values()):
            raise ValueError("its data are cut off")
        return tensors
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from error


def to_disk(path: Path) -> None:
    """Returns when a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
