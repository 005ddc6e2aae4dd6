"""Deltas: files that hold the changes from one version of the weights to the next.

A delta is small after one step of reinforcement learning, because the learning rate is so low that few elements change
in bfloat16.

Elements are compared and changed as bits, so NaNs and the sign of zero are preserved. A tensor is split into chunks,
which bounds the memory of the encoder and the decoder. A chunk is *sparse* or *whole*, whichever is smaller. A sparse
chunk holds the number of unchanged elements before each change, and the increase of the changed element's bits, read as
an integer. A whole chunk holds all new bits.

The numbers of a chunk are split into planes: the lowest bytes of all numbers, then the next bytes, and so on. Each
plane is compressed on its own. The gaps are distributed almost geometrically, so their bytes are independent of each
other, and after one step nearly all changes are by one. Therefore more than an entropy coder would gain little.

The file is a safetensors file. It has a uint8 tensor for each changed tensor, and a JSON manifest in its metadata.
"""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from millrace.checksum import Checksum, checksum, tensor_checksum
from millrace.errors import DataError, PublishError
from millrace.model_folder import file_header, to_disk

CHUNK = 1 << 20  # elements, few enough for the processor's cache
IN_MEMORY = 1 << 28  # bytes of payloads; more are written to a temporary file
GAP_BYTES = 4
LARGEST = 1 << 48  # elements; more than any tensor has, and too few for strides to overflow
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
        torch.bfloat16, torch.float16, torch.float32, torch.float64,
    )
}  # fmt: skip

Bits = npt.NDArray[np.unsignedinteger]
Pair = tuple[str, torch.Tensor | None, torch.Tensor]
Encoded = tuple["Chunk", list[bytes]]  # a chunk and its compressed planes


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """The size of a delta.

    changed: the number of changed elements.
    elements: the number of all elements.
    nbytes: the size of the new tensors.
    wire_nbytes: the size of the file.
    """

    changed: int
    elements: int
    nbytes: int
    wire_nbytes: int


class Chunk(BaseModel):
    """Up to CHUNK elements of a tensor. `gaps` and `bits` are the sizes in bytes of the compressed planes, the lowest
    plane first. Higher planes are zero and not stored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: Literal["sparse", "whole"] = "sparse"
    changed: NonNegativeInt = 0
    gaps: tuple[PositiveInt, ...] = ()
    bits: tuple[PositiveInt, ...] = ()


class TensorDelta(BaseModel):
    """One tensor of the new version.

    base: the `tensor_checksum` of the old tensor; None if no old tensor is needed, because all chunks are whole.
    checksum: the `tensor_checksum` of the new tensor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    base: str | None
    checksum: str
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the new tensor in bytes."""
        return self.elements * self.torch_dtype.itemsize

    @property
    def payload_nbytes(self) -> int:
        return sum(sum(chunk.gaps) + sum(chunk.bits) for chunk in self.chunks)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype}")
        if math.prod(max(extent, 1) for extent in self.shape) >= LARGEST:
            raise ValueError("its shape is too large for any memory")
        if len(self.chunks) != math.ceil(self.elements / CHUNK):
            raise ValueError(f"{len(self.chunks)} chunks do not fit the shape {list(self.shape)}")
        for chunk, (begin, end) in zip(self.chunks, _spans(self.elements), strict=True):
            if chunk.changed > end - begin:
                raise ValueError("more elements have changed than there are")
            if len(chunk.gaps) > GAP_BYTES or len(chunk.bits) > self.torch_dtype.itemsize:
                raise ValueError("there are more planes than an element has bytes")
            if chunk.form == "whole" and chunk.gaps:
                raise ValueError("a whole chunk has no gaps")
            if chunk.form == "sparse" and self.base is None:
                raise ValueError("a sparse chunk needs a base")
        return self


class Manifest(BaseModel):
    """Everything in a delta except its payloads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base_version: NonNegativeInt
    version: NonNegativeInt
    tensors: dict[str, TensorDelta]


def write_delta(path: Path, base_version: int, version: int, pairs: Iterable[Pair]) -> DeltaReport:
    """Write a delta that turns `base_version` into `version`. Blocks.

    The file is created, or replaced, when all of it is on the disk.

    pairs: (name, old, new) for every tensor of the new version, taken one by one. `old` is None if the base version
        does not have the tensor. Both tensors are on the CPU and of any shape. A tensor whose dtype or shape has
        changed is stored whole.

    Raises PublishError if a name occurs twice or a dtype is not in DTYPES, and OSError. The path is unchanged then.
    """
    tensors: dict[str, TensorDelta] = {}
    changed = 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        # The header is the first part of the file, and is known last.
        with (
            tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(path.parent)) as payloads,
            partial.open("wb") as file,
        ):
            for name, old, new in pairs:
                if name in tensors:
                    raise PublishError(f"the trainer named a tensor twice: {name}")
                if _name(new.dtype) not in DTYPES:
                    raise PublishError(f"{name} is of {new.dtype}, which a delta can't store")
                tensors[name] = _encode_tensor(old, new, payloads)
                changed += sum(chunk.changed for chunk in tensors[name].chunks)
            file.write(_header(Manifest(base_version=base_version, version=version, tensors=tensors)))
            payloads.seek(0)
            shutil.copyfileobj(payloads, file)
        to_disk(partial)
        size = partial.stat().st_size
        partial.rename(path)
        to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    elements, nbytes = sum(t.elements for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    return DeltaReport(changed, elements, nbytes, size)


def read_delta(path: Path) -> "Delta":
    """Open a delta. Its tensors are read when they are applied. Raises DataError if the file is missing, damaged, or
    not one that `write_delta` could have written."""
    try:
        file: Any = safe_open(path, framework="numpy")  # its methods have no types
        metadata = file.metadata() or {}
        text = metadata["manifest"].encode()
        if checksum(memoryview(text)) != metadata["checksum"]:
            raise DataError(f"{path} is damaged: its manifest is not what was written")
        manifest = Manifest.model_validate_json(text)
        sizes = {name: tensor.payload_nbytes for name, tensor in manifest.tensors.items() if tensor.payload_nbytes}
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
        if {name: (part.get_dtype(), part.get_shape()) for name, part in stored.items()} != {
            name: ("U8", [size]) for name, size in sizes.items()
        }:
            raise DataError(f"{path} is damaged: its payloads are not those of its manifest")
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        raise DataError(f"{path} is not a whole delta: {error}") from error
    return Delta(path, manifest, file)


class Delta:
    """An open delta, which turns the tensors of `base_version` into those of `version`."""

    def __init__(self, path: Path, manifest: Manifest, file: Any) -> None:
        self._path, self._file = path, file
        self.base_version, self.version = manifest.base_version, manifest.version
        self.tensors: Mapping[str, TensorDelta] = manifest.tensors

    def apply(self, name: str, old: torch.Tensor | None) -> torch.Tensor:
        """Return the new tensor of that name, on the CPU and in its own memory. It is bit-identical to the tensor that
        was written. Blocks.

        old: the tensor of `base_version`, on the CPU. It is ignored if `tensors[name].base` is None.

        Allocates `tensors[name].nbytes` and a chunk. If a tensor has no base, compare that size with the model first.

        Raises DataError if the result is not the tensor that was written, because `old` is not the tensor that the
        delta was made from, or because the file is damaged.

            delta = read_delta(path)
            new = {name: delta.apply(name, old.get(name)) for name in delta.tensors}
        """
        entry = self.tensors[name]
        tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
        bits = _bits(tensor)
        for piece in self.pieces(name, old):
            bits[piece.begin : piece.begin + piece.bits.size] = piece.bits
        return tensor

    def pieces(self, name: str, old: torch.Tensor | None) -> Iterator["Piece"]:
        """Yield the new tensor of that name in pieces, in order. Blocks. The arguments and errors are those of `apply`.

        Allocates a chunk. Whether the pieces are right is known only after the last one.
        """
        entry = self.tensors[name]
        if entry.base is None:
            old = None
        elif old is None or old.dtype != entry.torch_dtype or tuple(old.shape) != entry.shape:
            given = "none" if old is None else f"{old.dtype} {list(old.shape)}"
            raise DataError(f"{self._path} changes {name} of {entry.dtype} {list(entry.shape)}, but was given {given}")
        old_bits = None if old is None else _bits(old)
        payload = memoryview(self._file.get_tensor(name) if entry.payload_nbytes else b"")
        space = np.empty(min(CHUNK, entry.elements), f"u{entry.torch_dtype.itemsize}")
        result, offset = Checksum(), 0
        try:
            for chunk, (begin, end) in zip(entry.chunks, _spans(entry.elements), strict=True):
                ends = list(itertools.accumulate((*chunk.gaps, *chunk.bits), initial=offset))
                frames = [payload[start:stop] for start, stop in itertools.pairwise(ends)]
                offset = ends[-1]
                piece = _decode(
                    chunk, frames, begin, None if old_bits is None else old_bits[begin:end], space[: end - begin]
                )
                result.update(piece.bits.data)
                yield piece
        except (zstandard.ZstdError, ValueError) as error:
            raise DataError(f"{self._path} is damaged at {name}: {error}") from error
        if result.hexdigest() == entry.checksum:  # so the old tensor was the right one too
            return
        if old is not None and tensor_checksum(old.contiguous()) != entry.base:
            raise DataError(f"{self._path} changes version {self.base_version}, but was given another {name}")
        raise DataError(f"{self._path} is damaged: its {name} is not that of version {self.version}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a new tensor, from element `begin` on.

    bits: the elements as unsigned integers. They change when the next piece is taken.
    changed: the positions in `bits` of the elements that have changed, [changed] int64, ascending; None if they are not
        known.
    values: these elements, [changed].
    """

    begin: int
    bits: Bits
    changed: npt.NDArray[np.int64] | None
    values: Bits


def _encode_tensor(old: torch.Tensor | None, new: torch.Tensor, payloads: IO[bytes]) -> TensorDelta:
    """Write the compressed planes to `payloads`, chunk by chunk, and return the manifest's entry."""
    if old is not None and (old.dtype != new.dtype or old.shape != new.shape):
        old = None
    new_bits, old_bits = _bits(new), None if old is None else _bits(old)
    # Almost no search for repetitions. Only zeros repeat; other repetitions are random, and cost more than they save.
    parameters = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    base, result = Checksum(), Checksum()
    chunks: list[Chunk] = []
    for begin, end in _spans(new_bits.size):
        new_part, old_part = new_bits[begin:end], None if old_bits is None else old_bits[begin:end]
        result.update(new_part.data)
        if old_part is not None:
            base.update(old_part.data)
        chunk, frames = _encode(old_part, new_part, compressor)
        payloads.writelines(frames)
        chunks.append(chunk)
    return TensorDelta(
        dtype=_name(new.dtype),
        shape=tuple(new.shape),
        base=None if old is None else base.hexdigest(),
        checksum=result.hexdigest(),
        chunks=tuple(chunks),
    )


def _encode(old: Bits | None, new: Bits, compressor: zstandard.ZstdCompressor) -> Encoded:
    """Return the chunk in its smaller form."""
    if old is None:
        return _whole(new, new.size, compressor)
    positions = np.flatnonzero(old != new)
    if not positions.size:
        return Chunk(), []
    gaps = (np.diff(positions, prepend=-1) - 1).astype(np.uint32)
    growth = (new[positions] - old[positions]).view(f"i{new.itemsize}")
    # Zigzag: small changes in either direction become small numbers.
    folded = ((growth << 1) ^ (growth >> (8 * new.itemsize - 1))).view(new.dtype)
    places, amounts = _planes(gaps, compressor), _planes(folded, compressor)
    chunk = Chunk(changed=positions.size, gaps=tuple(map(len, places)), bits=tuple(map(len, amounts)))
    if 2 * (sum(chunk.gaps) + sum(chunk.bits)) <= new.nbytes:  # a whole chunk is hardly ever smaller than half of that
        return chunk, places + amounts
    sparse, whole = (chunk, places + amounts), _whole(new, positions.size, compressor)
    return min(sparse, whole, key=lambda encoded: sum(map(len, encoded[1])))


def _whole(new: Bits, changed: int, compressor: zstandard.ZstdCompressor) -> Encoded:
    planes = _planes(new, compressor)
    return Chunk(form="whole", changed=changed, bits=tuple(map(len, planes))), planes


def _decode(chunk: Chunk, frames: Sequence[memoryview], begin: int, old: Bits | None, new: Bits) -> Piece:
    """Return a chunk's new elements, in `new` or, if none has changed, in `old`. Raises ValueError or ZstdError if the
    frames are not the chunk's."""
    if chunk.form == "whole" or old is None:
        new[:] = _joined(frames, new.size, new.dtype)
        return Piece(begin, new, None, new[:0])
    if not chunk.changed:
        return Piece(begin, old, np.empty(0, np.int64), old[:0])
    gaps = _joined(frames[: len(chunk.gaps)], chunk.changed, np.dtype(np.uint32))
    folded = _joined(frames[len(chunk.gaps) :], chunk.changed, old.dtype)
    positions = np.cumsum(gaps, dtype=np.int64)
    positions += np.arange(chunk.changed)
    if positions[-1] >= old.size:
        raise ValueError("a position is outside of the tensor")
    new[:] = old
    values = new[positions]
    values += (folded >> 1) ^ -(folded & 1)
    new[positions] = values
    return Piece(begin, new, positions, values)


def _planes(values: Bits, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    """Return the compressed planes of the values, the lowest bytes first. The highest planes are left out if they are
    zero."""
    used = (int(values.max()).bit_length() + 7) // 8
    by_byte = values.view(np.uint8).reshape(values.size, values.itemsize)
    return [compressor.compress(np.ascontiguousarray(by_byte[:, number]).data) for number in range(used)]


def _joined(frames: Sequence[memoryview], count: int, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """Return the values that `_planes` split. A frame is decompressed only if it declares a size of `count` bytes."""
    by_byte = np.zeros((count, dtype.itemsize), np.uint8)
    for number, frame in enumerate(frames):
        if (size := zstandard.frame_content_size(frame)) != count:
            raise ValueError(f"a plane of {count} elements has {size} bytes")
        plane = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        by_byte[:, number] = np.frombuffer(plane, np.uint8)
    return by_byte.reshape(-1).view(dtype)


def _bits(tensor: torch.Tensor) -> Bits:
    """Return the elements as unsigned integers, flat. Shares the tensor's memory if it is contiguous. Little-endian, as
    on all platforms of torch."""
    # as_strided, because a contiguous tensor of one element may have any stride; reshape keeps it, and view refuses it.
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spans(elements: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + CHUNK, elements)) for begin in range(0, elements, CHUNK))


def _header(manifest: Manifest) -> bytes:
    """Return the header of a safetensors file with the manifest's payloads, in their order."""
    text = manifest.model_dump_json(exclude_defaults=True)
    sizes = {name: tensor.payload_nbytes for name, tensor in manifest.tensors.items() if tensor.payload_nbytes}
    return file_header(
        {name: ("U8", [size], size) for name, size in sizes.items()},
        {"manifest": text, "checksum": checksum(memoryview(text.encode()))},
    )
