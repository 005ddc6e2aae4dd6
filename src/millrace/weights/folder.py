"""The weights in a model's folder: their names and checksums, read without torch."""

import mmap
from pathlib import Path

import orjson

from millrace.checksum import checksum
from millrace.errors import DataError

HEADER_LENGTH_BYTES = 8


def folder_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every tensor in the folder's safetensors files.

    The format (a little-endian length, a JSON header, the bytes) is that of https://github.com/huggingface/safetensors.
    Raises DataError when the folder has no such file or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors file; give a model's folder in Hugging Face's format")
    checksums: dict[str, str] = {}
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                start = HEADER_LENGTH_BYTES + int.from_bytes(mapped[:HEADER_LENGTH_BYTES], "little")
                header = orjson.loads(mapped[HEADER_LENGTH_BYTES:start])
                view = memoryview(mapped)
                for name, entry in header.items():
                    if name != "__metadata__":
                        begin, end = entry["data_offsets"]
                        with view[start + begin : start + end] as data:
                            checksums[name] = checksum(data)
                view.release()
            except (orjson.JSONDecodeError, KeyError, ValueError) as error:
                raise DataError(f"{path} is not a whole safetensors file: {error}") from error
    return checksums
