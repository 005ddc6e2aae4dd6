"""What changed from one version of the weights to the next, in a file: little, after one step of reinforcement
learning, whose learning rate moves few of the elements by as much as bfloat16 can tell.

Elements are compared and changed as bits, so NaNs and the sign of zero arrive as they are. A tensor is cut into chunks,
which bounds what the encoder and the decoder need beside it. A chunk is *sparse* (how many elements lie between one
change and the next, and by how much the bits of each, read as an integer, have grown) or *whole* (all new bits),
whichever is smaller. Either's numbers are split into planes, the lowest bytes of all, then the next bytes of all, each
compressed by itself: gaps are distributed about geometrically, so their bytes are independent of each other, and after
one step nearly all changes are by one; more than an entropy coder would gain little.

The file is a safetensors file: a uint8 tensor for each changed one, and a manifest, as JSON, in its metadata.
"""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import orjson
import torch
import zstandard
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from millrace.checksum import Checksum, checksum
from millrace.errors import DataError, PublishError
from millrace.model_folder import HEADER_LENGTH_BYTES, to_disk

CHUNK = 1 << 20  # elements: what is made of them stays near the processor's cache
IN_MEMORY = 1 << 28  # bytes of payloads; what is above goes to a file that has no name
GAP_BYTES = 4
LARGEST = 1 << 48  # elements: above any tensor, below what strides overflow at
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
Encoded = tuple["Chunk", list[bytes]]  # with its compressed planes


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What a delta holds. `changed` of `elements`; `nbytes` of the new tensors, `wire_nbytes` of the file."""

    changed: int
    elements: int
    nbytes: int
    wire_nbytes: int


class Chunk(BaseModel):
    """Up to CHUNK elements. `gaps` and `bits`: bytes of the compressed planes, lowest first; those above are zero."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: Literal["sparse", "whole"] = "sparse"
    changed: NonNegativeInt = 0
    gaps: tuple[PositiveInt, ...] = ()
    bits: tuple[PositiveInt, ...] = ()


class TensorDelta(BaseModel):
    """One tensor of the new version. `base` and `checksum` are `tensor_checksum`'s of the old tensor and of the new
    one; without a base all chunks are whole, and no old tensor is needed."""

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
        """Of the new tensor."""
        return self.elements * self.torch_dtype.itemsize

    @property
    def payload_nbytes(self) -> int:
        return sum(sum(chunk.gaps) + sum(chunk.bits) for chunk in self.chunks)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype}")
        if math.prod(max(extent, 1) for extent in self.shape) >= LARGEST:
            raise ValueError("no memory has room for its shape")
        if len(self.chunks) != math.ceil(self.elements / CHUNK):
            raise ValueError(f"{len(self.chunks)} chunks are not those of shape {list(self.shape)}")
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
    """All of a delta but its payloads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base_version: NonNegativeInt
    version: NonNegativeInt
    tensors: dict[str, TensorDelta]


def write_delta(path: Path, base_version: int, version: int, pairs: Iterable[Pair]) -> DeltaReport:
    """Writes what turns `base_version` into `version`. The file appears when all of it is on the disk.

    pairs: for every tensor of the new version its name, the old one (None where there was none) and the new one, both
    on the CPU, of any shape. They are taken one by one. One whose dtype or shape has changed is sent whole. Blocks.
    Raises PublishError for a name that comes twice and for a dtype that is not in DTYPES, and OSError; the path is then
    as it was.
    """
    tensors: dict[str, TensorDelta] = {}
    changed = 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        # The header, which comes first, is known last.
        with (
            tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(path.parent)) as payloads,
            partial.open("wb") as file,
        ):
            for name, old, new in pairs:
                if name in tensors:
                    raise PublishError(f"the trainer named a tensor twice: {name}")
                if _name(new.dtype) not in DTYPES:
                    raise PublishError(f"{name} is of {new.dtype}, which a delta can't hold")
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
    """Opens a delta; the tensors are read when they are applied. Raises DataError when the file is missing, damaged or
    not one that `write_delta` could have written."""
    try:
        file: Any = safe_open(path, framework="numpy")  # its methods have no types
        metadata = file.metadata() or {}
        text = metadata["manifest"].encode()
        if checksum(memoryview(text)) != metadata["checksum"]:
            raise DataError(f"{path} is damaged: its manifest is not what was written")
        manifest = Manifest.model_validate_json(text)
        sizes = {name: tensor.payload_nbytes for name, tensor in manifest.tensors.items() if tensor.payload_nbytes}
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
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
        """The new tensor of that name, of its own memory, bit for bit the one that was written.

        old: that of `base_version`, on the CPU; not looked at where `tensors[name].base` is None. What is allocated is
        `tensors[name].nbytes` and a chunk: for a tensor without a base, compare that with the model before. Raises
        DataError when old is not what the delta was made from or the file is damaged. Blocks.
        """
        entry = self.tensors[name]
        if entry.base is None:
            old = None
        elif old is None or old.dtype != entry.torch_dtype or tuple(old.shape) != entry.shape:
            held = "nothing" if old is None else f"{old.dtype} {list(old.shape)}"
            raise DataError(f"{self._path} changes {name} of {entry.dtype} {list(entry.shape)}, and here is {held}")
        tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
        new_bits, old_bits = _bits(tensor), None if old is None else _bits(old)
        base, result = Checksum(), Checksum()
        payload = self._file.get_slice(name) if entry.payload_nbytes else ()
        offset = 0
        try:
            for chunk, (begin, end) in zip(entry.chunks, _spans(entry.elements), strict=True):
                ends = list(itertools.accumulate((*chunk.gaps, *chunk.bits), initial=offset))
                frames = [bytes(payload[one:two]) for one, two in itertools.pairwise(ends)]
                offset = ends[-1]
                new_part, old_part = new_bits[begin:end], None if old_bits is None else old_bits[begin:end]
                _decode(chunk, frames, old_part, new_part)
                result.update(new_part.data)
                if old_part is not None:
                    base.update(old_part.data)
        except (zstandard.ZstdError, ValueError) as error:
            raise DataError(f"{self._path} is damaged at {name}: {error}") from error
        if entry.base is not None and base.hexdigest() != entry.base:
            raise DataError(f"{self._path} changes version {self.base_version}, and the {name} here is not that one's")
        if result.hexdigest() != entry.checksum:
            raise DataError(f"{self._path} is damaged: it does not give the {name} of version {self.version}")
        return tensor


def _encode_tensor(old: torch.Tensor | None, new: torch.Tensor, payloads: IO[bytes]) -> TensorDelta:
    """The entry of the manifest; the compressed planes go to `payloads`, chunk by chunk."""
    if old is not None and (old.dtype != new.dtype or old.shape != new.shape):
        old = None
    new_bits, old_bits = _bits(new), None if old is None else _bits(old)
    # Next to no search for repetitions: there are none but zeros, and those that chance makes cost more than they save.
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
    """The smaller form."""
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
    if 2 * (sum(chunk.gaps) + sum(chunk.bits)) <= new.nbytes:  # below half a whole one hardly ever is
        return chunk, places + amounts
    sparse, whole = (chunk, places + amounts), _whole(new, positions.size, compressor)
    return min(sparse, whole, key=lambda encoded: sum(map(len, encoded[1])))


def _whole(new: Bits, changed: int, compressor: zstandard.ZstdCompressor) -> Encoded:
    planes = _planes(new, compressor)
    return Chunk(form="whole", changed=changed, bits=tuple(map(len, planes))), planes


def _decode(chunk: Chunk, frames: list[bytes], old: Bits | None, new: Bits) -> None:
    """Fills `new`. Raises ValueError and ZstdError for frames that are not the chunk's."""
    if chunk.form == "whole" or old is None:
        new[:] = _joined(frames, new.size, new.dtype)
        return
    gaps = _joined(frames[: len(chunk.gaps)], chunk.changed, np.dtype(np.uint32))
    folded = _joined(frames[len(chunk.gaps) :], chunk.changed, new.dtype)
    positions = np.cumsum(gaps, dtype=np.int64) + np.arange(chunk.changed)
    if chunk.changed and positions[-1] >= new.size:
        raise ValueError("a position is outside of the tensor")
    new[:] = old
    new[positions] += (folded >> 1) ^ -(folded & 1)


def _planes(values: Bits, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    """The bytes of the values by their significance, each plane compressed, without the highest that are all zero."""
    used = (int(values.max()).bit_length() + 7) // 8
    by_byte = values.view(np.uint8).reshape(values.size, values.itemsize)
    return [compressor.compress(np.ascontiguousarray(by_byte[:, number]).data) for number in range(used)]


def _joined(frames: list[bytes], count: int, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """What `_planes` has split. A frame must say that it holds `count` bytes before any is made room for."""
    by_byte = np.zeros((count, dtype.itemsize), np.uint8)
    for number, frame in enumerate(frames):
        if (size := zstandard.frame_content_size(frame)) != count:
            raise ValueError(f"a plane of {count} elements has {size} bytes")
        plane = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        by_byte[:, number] = np.frombuffer(plane, np.uint8)
    return by_byte.reshape(-1).view(dtype)


def _bits(tensor: torch.Tensor) -> Bits:
    """The elements as unsigned integers, flat: the tensor's own memory where it is contiguous. Little-endian, as all
    that torch runs on."""
    # reshape would keep the odd stride that a contiguous tensor of one element may have, and no view is made of that.
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spans(elements: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + CHUNK, elements)) for begin in range(0, elements, CHUNK))


def _header(manifest: Manifest) -> bytes:
    """Of a safetensors file with the manifest's payloads, in its order: the length of what follows, and JSON."""
    text = manifest.model_dump_json(exclude_defaults=True)
    header: dict[str, object] = {
        "__metadata__": {"manifest": text, "checksum": checksum(memoryview(text.encode()))},
    }
    sizes = {name: tensor.payload_nbytes for name, tensor in manifest.tensors.items() if tensor.payload_nbytes}
    ends = itertools.accumulate(sizes.values())
    for (name, size), end in zip(sizes.items(), ends, strict=True):
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
    written = orjson.dumps(header)
    written += b" " * (-len(written) % HEADER_LENGTH_BYTES)
    return len(written).to_bytes(HEADER_LENGTH_BYTES, "little") + written
