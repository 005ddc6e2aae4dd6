"""The weights in a model's folder: their checksums, read without torch."""

import itertools
import mmap
from pathlib import Path

from millrace.checksum import checksum
from millrace.model_folder import stored_tensors


def folder_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every tensor in the folder's safetensors files. Raises DataError as `stored_tensors` does."""
    checksums: dict[str, str] = {}
    for path, tensors in itertools.groupby(stored_tensors(folder).items(), lambda item: item[1].file):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            for name, tensor in tensors:
                with view[tensor.begin : tensor.end] as data:
                    checksums[name] = checksum(data)
            view.release()
    return checksums
