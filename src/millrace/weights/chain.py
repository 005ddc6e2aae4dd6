"""The files of a version store: whole folders (anchors), and deltas, each of which changes an earlier version.

`index.json` lists the versions that are complete and on the disk. It is written after their files.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import fsspec
import orjson
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from millrace.checksum import checksum, tensor_checksum
from millrace.errors import DataError
from millrace.weights.delta import Delta, read_delta

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

INDEX = "index.json"
CHECKSUMS = "checksums.json"  # the checksum of every tensor in a folder
PREFIX = "version-"


class Entry(BaseModel):
    """A version in the index.

    base: the version that its delta changes; None if the version is a whole folder.
    digest: the `digest_of` its tensors' checksums, which distinguishes it from the same version of another run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: NonNegativeInt
    base: NonNegativeInt | None = None
    digest: str

    @property
    def name(self) -> str:
        """The name of its folder or file, below the store's root."""
        return folder_name(self.version) if self.base is None else f"{folder_name(self.version)}.delta"


class Index(BaseModel):
    """The content of `index.json`. The oldest version comes first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    versions: tuple[Entry, ...]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        before: list[int] = []
        for entry in self.versions:
            if before and entry.version <= before[-1]:
                raise ValueError(f"version {entry.version} comes after {before[-1]}")
            if entry.base is not None and entry.base not in before:
                raise ValueError(f"version {entry.version} changes version {entry.base}, which is missing")
            before.append(entry.version)
        return self


def _is_torn(content: bytes) -> bool:
    """Return whether this is only the beginning of an index, or empty. A full disk or a power cut can cause that."""
    text, start = content.rstrip(b"\0"), b'{"versions":['
    if not text.startswith(start[: len(text)]):
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return True
    return False


class Source:
    """The files of the store at `url`, a path or a URL that fsspec knows. Raises ImportError or ValueError if fsspec
    does not know the kind of URL."""

    def __init__(self, url: str) -> None:
        self.files, self.root = fsspec.url_to_fs(url)
        self.local = isinstance(self.files, LocalFileSystem)

    def index(self, *, torn: bool = False) -> tuple[Entry, ...]:
        """Return the entries of the index; empty if there is no index, or if `torn` is set and there is only the
        beginning of one. Raises DataError if the index is damaged, and OSError if it can't be read."""
        path = f"{self.root}/{INDEX}"
        content = b""
        try:
            content = self.files.cat_file(path)
            return Index.model_validate_json(content.rstrip(b"\0")).versions
        except FileNotFoundError:
            return ()
        except (IsADirectoryError, ValidationError) as error:
            if torn and isinstance(error, ValidationError) and _is_torn(content):
                logger.warning("%s is torn: its versions are lost, and the next one is written whole", path)
                return ()
            raise DataError(f"{path} is not a store's index: {error}") from error

    def fetch(self, entry: Entry, place: Path) -> None:
        """Copy the version's folder or file to `place`. Raises OSError."""
        if entry.base is not None:
            self.files.get_file(f"{self.root}/{entry.name}", str(place))
            return
        self.files.invalidate_cache()  # it may list the files of another run
        place.mkdir()
        for path in self.files.find(f"{self.root}/{entry.name}"):
            self.files.get_file(path, str(place / path.rpartition("/")[2]))


class FullCheckpoint:
    """A version's folder, memory-mapped. Raises DataError if a tensor is missing or has no checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}  # safetensors has no types
        self.checksums = read_checksums(folder)
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file: Any = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder} is not a whole version: {error}") from error
        if lost := self.checksums.keys() - self._files.keys():
            raise DataError(f"{folder} has lost {min(lost)}")
        if added := self._files.keys() - self.checksums.keys():
            raise DataError(f"{folder}: {min(added)} is not what was written")

    def get(self, name: str) -> "torch.Tensor | None":
        """Return the tensor, without comparing it with its checksum; None if there is no such tensor."""
        if name not in self._files:
            return None
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def compared(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield every tensor. Raises DataError if a tensor does not match its checksum."""
        for name, expected in self.checksums.items():
            tensor = self._files[name].get_tensor(name)
            if tensor_checksum(tensor) != expected:
                raise DataError(f"{self.folder}: {name} is not what was written")
            yield name, tensor


def folder_name(version: int) -> str:
    """Return the name of the version's folder: "version-00000007"."""
    return f"{PREFIX}{version:08d}"


def digest_of(checksums: Mapping[str, str]) -> str:
    """Return one checksum of all checksums."""
    return checksum(memoryview(orjson.dumps(dict(checksums), option=orjson.OPT_SORT_KEYS)))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums that were written with the folder. Raises DataError if there are none."""
    path = folder / CHECKSUMS
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{folder} is not a whole version: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} has no checksums")
    return found


def way_to(entries: Sequence[Entry], version: int, available: Set[int]) -> tuple[Entry, list[Entry]]:
    """Return the whole version to start from, and the deltas to apply to it, in order. The whole version is an anchor
    or in `available`."""
    by_version = {entry.version: entry for entry in entries}
    entry = by_version[version]
    deltas: list[Entry] = []
    while entry.base is not None and entry.version not in available:
        deltas.append(entry)
        entry = by_version[entry.base]
    return entry, deltas[::-1]


def kept(entries: Sequence[Entry], keep: int) -> list[Entry]:
    """Return the last `keep` entries and the entries that these are built from."""
    needed: set[int] = set()
    for entry in entries[-keep:]:
        anchor, deltas = way_to(entries, entry.version, frozenset())
        needed |= {anchor.version, *(delta.version for delta in deltas)}
    return [entry for entry in entries if entry.version in needed]


def read_version(
    folder: Path, anchor: Entry, deltas: Sequence[tuple[Entry, Path]]
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every tensor of the last delta's version, or of the anchor's if there are no deltas. The arguments and
    errors are those of `opened_version`; a tensor is compared with its checksum before it is yielded."""
    whole, opened = opened_version(folder, anchor, deltas)
    if not opened:
        yield from whole.compared()
        return
    for name in opened[-1].tensors:
        tensor = applied(whole, opened, name)
        assert tensor is not None  # the last delta has this name
        yield name, tensor


def opened_version(
    folder: Path, anchor: Entry, deltas: Sequence[tuple[Entry, Path]]
) -> tuple[FullCheckpoint, list[Delta]]:
    """Return a whole version and the deltas to apply to each of its tensors in turn.

    folder: the folder of the anchor, which is memory-mapped.
    deltas: each with the path of its file.

    Raises DataError if they are not the versions that the entries name.
    """
    whole = FullCheckpoint(folder)
    _require_digest(whole.checksums, anchor, folder)
    opened: list[Delta] = []
    for entry, path in deltas:
        delta = read_delta(path)
        _require_digest({name: tensor.checksum for name, tensor in delta.tensors.items()}, entry, path)
        opened.append(delta)
    return whole, opened


def applied(whole: FullCheckpoint, deltas: Sequence[Delta], name: str) -> "torch.Tensor | None":
    """Return a tensor after these deltas; None if their version does not have it. A delta verifies the tensor that it
    is applied to, and the result."""
    tensor = whole.get(name)
    for delta in deltas:
        tensor = delta.apply(name, tensor) if name in delta.tensors else None
    return tensor


def _require_digest(checksums: Mapping[str, str], entry: Entry, path: Path) -> None:
    if digest_of(checksums) != entry.digest:
        raise DataError(f"{path} is not the version {entry.version} that the index names")
