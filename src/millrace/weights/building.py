"""Builds a version's folder from the folder of an earlier version and deltas, and a file of what has changed.

Each tensor passes through a small piece of memory. It is compared with its checksums there, and written from there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from millrace.extension.millrace_dtypes import DTYPES
from millrace.model_folder import INDEX, file_header
from millrace.weights.chain import FullCheckpoint, applied
from millrace.weights.delta import Delta, Piece, TensorDelta
from millrace.weights.folder import copy_other_files

SPARSE = 8  # a tensor is changed element by element if at most one element in so many has changed
WIDE = 2**31  # elements of a tensor whose positions need 8 bytes
STORED = {torch_name: name for name, torch_name in DTYPES.items()}
Layout = dict[str, tuple[str, Sequence[int], int]]  # of a safetensors file: dtype, shape and size of each tensor


def build(place: Path, whole: FullCheckpoint, deltas: Sequence[Delta], file_bytes: int, changes: Path) -> None:
    """Write the version of the last delta to the new folder `place`. It is not flushed to the disk.

    whole: the version that the first delta changes.
    file_bytes: about the size of each safetensors file.
    changes: where to write what has changed, as `ChangesFile` does, if there is one delta.

    Raises DataError if anything does not match its checksum, and OSError.
    """
    place.mkdir()
    *earlier, last = deltas
    files: dict[str, str] = {}
    with changes_file(changes, {} if earlier else last.tensors) as changed:
        for number, names in enumerate(_together(last.tensors, file_bytes)):
            file = f"model-{number:05d}.safetensors"
            with _created(place / file) as descriptor:
                _write(descriptor, file_header({name: _stored(last.tensors[name]) for name in names}, {"format": "pt"}))
                for name in names:
                    for piece in last.pieces(name, applied(whole, earlier, name)):
                        _write(descriptor, piece.bits.data.cast("B"))
                        changed.add(name, piece)
            files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(one.nbytes for one in last.tensors.values())}, "weight_map": files}
    (place / INDEX).write_text(json.dumps(index))
    copy_other_files(whole.folder, place)


class ChangesFile:
    """Writes what a delta changes, for engines that hold the version before.

    It is a safetensors file. `at/NAME` has the positions of the changed elements of a tensor, ascending ([changed]
    int32, or int64 if the tensor has more than 2^31 elements), and `to/NAME` their values ([changed], the tensor's
    dtype). `whole` in the metadata is a JSON list of tensors of which too much has changed. All others are unchanged.

    descriptor: of the file. places: where in the file each part begins. wide: the tensors whose positions are int64.
    """

    def __init__(self, descriptor: int, places: dict[str, int], wide: Set[str]) -> None:
        self._descriptor, self._places, self._wide = descriptor, places, wide

    def add(self, name: str, piece: Piece) -> None:
        """Write what has changed in the next piece of a tensor. Does nothing for a tensor that is not in the file."""
        if piece.changed is None or not piece.changed.size or f"at/{name}" not in self._places:
            return
        positions = (piece.changed + piece.begin).astype(np.int64 if name in self._wide else np.int32)
        for part, values in ((f"at/{name}", positions), (f"to/{name}", piece.values)):
            self._places[part] = _write_at(self._descriptor, self._places[part], values.data.cast("B"))


@contextmanager
def changes_file(path: Path, tensors: Mapping[str, TensorDelta]) -> Iterator[ChangesFile]:
    """Create the file of what a delta changes, to be written while the block runs.

    tensors: all of the delta; without any, there is no file.
    """
    if not tensors:
        yield ChangesFile(-1, {}, frozenset())
        return
    layout: Layout = {}
    copied = []
    for name, entry in tensors.items():
        count = sum(chunk.changed for chunk in entry.chunks)
        if entry.base is None or any(one.form == "whole" for one in entry.chunks) or count * SPARSE > entry.elements:
            copied.append(name)
        elif count:
            dtype, itemsize = ("I64", 8) if entry.elements > WIDE else ("I32", 4)
            layout[f"at/{name}"] = dtype, [count], count * itemsize
            layout[f"to/{name}"] = STORED[entry.dtype], [count], count * entry.torch_dtype.itemsize
    aligned = dict(sorted(layout.items(), key=lambda item: -(item[1][2] // item[1][1][0])))  # wide elements first
    header = file_header(aligned, {"whole": json.dumps(copied)})
    places, end = {}, len(header)
    for part, (_, _, nbytes) in aligned.items():
        places[part] = end
        end += nbytes
    with _created(path) as descriptor:
        _write(descriptor, header)
        yield ChangesFile(descriptor, places, {name for name, entry in tensors.items() if entry.elements > WIDE})


def _together(tensors: Mapping[str, TensorDelta], file_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file. Those with wide elements come first, so that all are aligned."""
    names: list[str] = []
    size = 0
    for name, entry in tensors.items():
        if names and size + entry.nbytes > file_bytes:
            yield sorted(names, key=lambda one: -tensors[one].torch_dtype.itemsize)
            names, size = [], 0
        names.append(name)
        size += entry.nbytes
    yield sorted(names, key=lambda one: -tensors[one].torch_dtype.itemsize)


def _stored(entry: TensorDelta) -> tuple[str, Sequence[int], int]:
    return STORED[entry.dtype], entry.shape, entry.nbytes


@contextmanager
def _created(path: Path) -> Iterator[int]:
    """Create a file, which engines may read as another user, and yield its descriptor."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(descriptor, 0o644)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of the content. Raises OSError."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _write_at(descriptor: int, place: int, content: memoryview) -> int:
    """Write all of the content to a place of a file, and return where it ends. Raises OSError."""
    while content:
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written
    return place
