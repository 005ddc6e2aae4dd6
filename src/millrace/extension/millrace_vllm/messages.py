"""Parses and checks the JSON that calls carry. Every function raises RpcError for content of the wrong form."""

import base64
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from millrace_boxes import read_box
from millrace_parts import Part
from millrace_receiving import Group

from .errors import RpcError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # each can be cast to the model's dtype
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a bucket contains: its name, dtype and shape, and its position in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def parse_specs(text: str) -> list[TensorSpec]:
    """The tensors of a bucket: a JSON list of [name, dtype, shape, offset, nbytes]."""
    rows = parsed(text)
    if not isinstance(rows, list):
        raise RpcError("the tensors must be a JSON list")
    return [parse_spec(row) for row in rows]


def parse_spec(row: Any) -> TensorSpec:
    if not isinstance(row, list) or len(row) != 5:
        raise RpcError("a tensor's description must be a JSON list of 5")
    tensor = dict(zip(("name", "dtype", "shape", "offset", "nbytes"), row, strict=True))
    name, dtype = take(tensor, "name", str), take(tensor, "dtype", str)
    shape, offset, nbytes = take(tensor, "shape", list), take(tensor, "offset", int), take(tensor, "nbytes", int)
    if dtype not in DTYPES:
        raise RpcError(f"{name}: unknown dtype {dtype}")
    if not all(type(size) is int and size >= 0 for size in shape) or offset < 0:
        raise RpcError(f"{name}: invalid shape {shape} or offset {offset}")
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape), offset, nbytes)
    if nbytes != math.prod(shape) * spec.dtype.itemsize:
        raise RpcError(f"{spec} does not have {nbytes} bytes")
    if offset % spec.dtype.itemsize:
        raise RpcError(f"{spec} cannot be at offset {offset} of a bucket")
    return spec


def parse_parts(text: str) -> list[Part]:
    """The parts of tensors in a bucket: a JSON list of [name, dtype, box, offset]."""
    rows = parsed(text)
    if not isinstance(rows, list):
        raise RpcError("the parts must be a JSON list")
    try:
        parts = [Part(str(name), DTYPES[dtype], read_box(box), int(at)) for name, dtype, box, at in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise RpcError(f"a part's description must be a JSON list of a name, dtype, box and offset: {error}") from error
    for part in parts:
        if any(start < 0 or start >= end for start, end in part.box) or part.offset < 0:
            raise RpcError(f"{part.label} at {part.offset} is no part of a tensor")
        if part.offset % part.dtype.itemsize:
            raise RpcError(f"{part.label} cannot be at offset {part.offset} of a bucket")
    return parts


def parse_group(body: dict[str, Any], rank: int) -> Group:
    """A sender's process group, in which this server's ranks have the numbers from `rank_offset` on."""
    try:
        return Group.read({**body, "rank": int(body["rank_offset"]) + rank})
    except (KeyError, TypeError, ValueError) as error:
        raise RpcError(f"the description of a process group is not complete: {error!r:.80}") from error


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`."""
    content = parsed(text)
    if not isinstance(content, dict):
        raise RpcError("the argument must be a JSON object")
    return content


def parsed(text: str) -> Any:
    """The JSON value in `text`."""
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise RpcError(f"invalid JSON: {error}") from error


def take(content: dict[str, Any], key: str, *kinds: type[T]) -> T:
    """The value of `key`, which must be of one of `kinds`. A bool does not pass for an int."""
    value = content.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RpcError(f"{key} is {value!r:.80}, not of type {kinds[-1].__name__}")
    return value


def take_bytes(content: dict[str, Any], key: str) -> bytes:
    """The bytes that the value of `key` encodes in base64."""
    try:
        return base64.b64decode(take(content, key, str), validate=True)
    except ValueError as error:
        raise RpcError(f"{key} is not valid base64") from error
