"""Safetensors files, mapped into memory.

`safe_open` gives each tensor memory of its own. Here the tensors of a file are views of one memory map, so that one
call of torch reads elements of many tensors. Extensions of engines run this file.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
from pathlib import Path

import torch
from millrace_boxes import strides_of
from millrace_dtypes import DTYPES

LENGTH_BYTES = 8


def mapped_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata. Nothing but the header is read yet. Writing
    to the tensors does not change the file.

    Raises ValueError if it is no such file, and OSError.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        header = json.loads(content[LENGTH_BYTES:begin])
        metadata = header.pop("__metadata__", {})
        size = len(content) - begin
        data = torch.frombuffer(content, dtype=torch.uint8, offset=begin) if size else torch.empty(0, dtype=torch.uint8)
        views = _Views(data)
        return {name: views.of(**entry) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error!r}") from error


class _Views:
    """Tensors in the bytes of a file, [nbytes] uint8, by one call of torch each: there are thousands of them."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data, self._nbytes = data, len(data)
        self._whole: dict[str, torch.Tensor] = {}  # the bytes as elements of each dtype

    def of(self, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> torch.Tensor:
        whole = self._whole.get(dtype)
        if whole is None:
            kind: torch.dtype = getattr(torch, DTYPES[dtype])
            usable = self._nbytes // kind.itemsize * kind.itemsize
            whole = self._whole[dtype] = self._data[:usable].view(kind)
        begin, end = data_offsets
        size = whole.itemsize
        if not 0 <= begin <= end <= self._nbytes or end - begin != math.prod(shape) * size:
            raise ValueError(f"a tensor of shape {shape} at bytes {begin} to {end} of {self._nbytes}")
        if begin % size or self._data.data_ptr() % size:  # torch has no view of these bytes
            return self._data[begin:end].clone().view(whole.dtype).view(shape)
        return whole.as_strided(shape, strides_of(shape), begin // size)
