"""The names and byte ranges of the tensors in a model folder in Hugging Face's format, read without torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from millrace.errors import DataError

HEADER_LENGTH_BYTES = 8
# The dtypes that can be cast to each other without a scale: safetensors' name -> torch's name.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CASTABLE = frozenset(FLOATS.values())
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# An adapter folder in PEFT's format: its files, and the prefix and suffixes of its tensors' names.
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
ADAPTER_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file, at the bytes `begin:end`. dtype is safetensors' name, as in `BF16`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def float_dtype(self) -> str | None:
        """torch's name of the dtype if it can be cast to another float without a scale; otherwise None."""
        return FLOATS.get(self.dtype)


def has_weights(folder: Path) -> bool:
    """Return whether the folder has any safetensors file."""
    return any(folder.glob("*.safetensors"))


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Return every tensor of the model in the folder, by name, ordered by file.

    The files are those that engines read: the files that the index names, or else `model.safetensors`, or else every
    safetensors file. Other files in the folder (a second set in another format, an older single file) are not part of
    the model. https://github.com/huggingface/safetensors describes the format: a little-endian length, a JSON header,
    the data.

    Raises DataError if the folder has no weights, a file of the index is missing, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors file; give a model's folder in Hugging Face's format")
    return {name: tensor for path in files for name, tensor in file_tensors(path).items()}


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
            raise DataError(f"{file} is missing, but {path.name} lists it")
        held = file_tensors(file)
        if lacking := [name for name in names if name not in held]:
            raise DataError(f"{file} has no tensor {lacking[0]}, which {path.name} places there")
        tensors |= {name: held[name] for name in names}
    return tensors


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file, by name. Raises DataError if it is damaged."""
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
        raise DataError(f"{path} is not a complete safetensors file: {error}") from error


def file_header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file, behind which the tensors' bytes follow in this order.

    tensors: safetensors' name of the dtype, the shape and the size in bytes of each, by name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    written = orjson.dumps(header)
    written += b" " * (-len(written) % HEADER_LENGTH_BYTES)
    return len(written).to_bytes(HEADER_LENGTH_BYTES, "little") + written


def to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
