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
CASTABLE = frozenset(FLOATS.values())
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

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


def has_weights(folder: Path) -> bool:
    """Whether the folder has any safetensors file."""
    return any(folder.glob("*.safetensors"))


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the model in the folder, by name, those of one file together.

    As engines read it: the index decides where there is one, otherwise `model.safetensors`, otherwise every safetensors
    file. What else lies in the folder (a second set of files in another format, an older single file) is no part of the
    model. The format (a little-endian length, a JSON header, the bytes) is that of
    https://github.com/huggingface/safetensors. Raises DataError where the folder has no weights, or lacks some, or one
    of its files is damaged.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors file; give a model's folder in Hugging Face's format")
    return {name: tensor for path in files for name, tensor in _read(path).items()}


def _indexed(folder: Path) -> Mapping[str, StoredTensor]:
    path = folder / INDEX
    try:
        files = orjson.loads(path.read_bytes())["weight_map"]
        wanted: dict[Path, list[str]] = {}
        for name, file in sorted(files.items(), key=lambda item: (item[1], item[0])):
            wanted.setdefault(folder / file, []).append(name)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an index of safetensors files: {error!r}") from error
    tensors: dict[str, StoredTensor] = {}
    for file, names in wanted.items():
        if not file.is_file():
            raise DataError(f"{file} is missing; {path.name} names it")
        held = _read(file)
        if lacking := [name for name in names if name not in held]:
            raise DataError(f"{file} has no {lacking[0]}; {path.name} says that it has")
        tensors |= {name: held[name] for name in names}
    return tensors


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
