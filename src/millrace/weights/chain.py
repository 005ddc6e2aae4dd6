"""Of which files a store's versions are made: whole folders (anchors), and deltas, each to a version before.

`index.json` names the versions that are whole and safe, and is written when their bytes are.
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
CHECKSUMS = "checksums.json"  # of every tensor in a folder
PREFIX = "version-"


class Entry(BaseModel):
    """A version. `base` is the one that its delta changes, None where it is a folder; `digest` is `digest_of` its
    tensors' checksums, and tells it from another run's version of that number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: NonNegativeInt
    base: NonNegativeInt | None = None
    digest: str

    @property
    def name(self) -> str:
        """Of its folder or file, below the store's root."""
        return folder_name(self.version) if self.base is None else f"{folder_name(self.version)}.delta"


class Index(BaseModel):
    """The oldest first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    versions: tuple[Entry, ...]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        before: list[int] = []
        for entry in self.versions:
            if before and entry.version <= before[-1]:
                raise ValueError(f"version {entry.version} comes after {before[-1]}")
            if entry.base is not None and entry.base not in before:
                raise ValueError(f"version {entry.version} changes version {entry.base}, which is not there")
            before.append(entry.version)
        return self


def _is_torn(content: bytes) -> bool:
    """Whether it is only the beginning of an index, or empty, as a full disk or a power cut leaves it."""
    begun, begins = content.rstrip(b"\0"), b'{"versions":['
    if not begun.startswith(begins[: len(begun)]):
        return False
    try:
        orjson.loads(begun)
    except orjson.JSONDecodeError:
        return True
    return False


class Source:
    """What lies at `url`, a path or a URL of fsspec's. Raises ImportError or ValueError where fsspec does not know the
    kind."""

    def __init__(self, url: str) -> None:
        self.files, self.root = fsspec.url_to_fs(url)
        self.local = isinstance(self.files, LocalFileSystem)

    def index(self, *, torn: bool = False) -> tuple[Entry, ...]:
        """The entries of the index; none where there is no index or, with `torn`, only the beginning of one. Raises
        DataError where the index can't be read, and OSError."""
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
        """Copies the version's folder or file to `place`. Raises OSError."""
        if entry.base is not None:
            self.files.get_file(f"{self.root}/{entry.name}", str(place))
            return
        self.files.invalidate_cache()  # it may list what another run had there
        place.mkdir()
        for path in self.files.find(f"{self.root}/{entry.name}"):
            self.files.get_file(path, str(place / path.rpartition("/")[2]))


class FullCheckpoint:
    """A version's folder, memory-mapped. Raises DataError where it lacks something or has too much."""

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
        """Not compared with its checksum. None where there is no such tensor."""
        if name not in self._files:
            return None
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def compared(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every tensor. Raises DataError where one is not what was written."""
        for name, expected in self.checksums.items():
            tensor = self._files[name].get_tensor(name)
            if tensor_checksum(tensor) != expected:
                raise DataError(f"{self.folder}: {name} is not what was written")
            yield name, tensor


def folder_name(version: int) -> str:
    return f"{PREFIX}{version:08d}"


def digest_of(checksums: Mapping[str, str]) -> str:
    """One checksum of all."""
    return checksum(memoryview(orjson.dumps(dict(checksums), option=orjson.OPT_SORT_KEYS)))


def read_checksums(folder: Path) -> dict[str, str]:
    """Those that were written with the folder. Raises DataError where there are none."""
    path = folder / CHECKSUMS
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{folder} is not a whole version: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} has no checksums")
    return found


def way_to(entries: Sequence[Entry], version: int, held: Set[int]) -> tuple[Entry, list[Entry]]:
    """The whole version to begin with, which is in `held` or an anchor, and the deltas to apply to it one by one."""
    by_version = {entry.version: entry for entry in entries}
    entry = by_version[version]
    deltas: list[Entry] = []
    while entry.base is not None and entry.version not in held:
        deltas.append(entry)
        entry = by_version[entry.base]
    return entry, deltas[::-1]


def kept(entries: Sequence[Entry], keep: int) -> list[Entry]:
    """The last `keep` and what they are made from."""
    needed: set[int] = set()
    for entry in entries[-keep:]:
        anchor, deltas = way_to(entries, entry.version, frozenset())
        needed |= {anchor.version, *(delta.version for delta in deltas)}
    return [entry for entry in entries if entry.version in needed]


def read_version(
    folder: Path, anchor: Entry, deltas: Sequence[tuple[Entry, Path]]
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Every tensor of the last of the deltas' versions, or of the anchor's where there is none: what is in `folder`,
    memory-mapped, and changed by each delta in turn. Raises DataError where anything is not what was written."""
    whole = FullCheckpoint(folder)
    _require_digest(whole.checksums, anchor, folder)
    opened: list[Delta] = []
    for entry, path in deltas:
        delta = read_delta(path)
        _require_digest({name: tensor.checksum for name, tensor in delta.tensors.items()}, entry, path)
        opened.append(delta)
    return _applied(whole, opened) if opened else whole.compared()


def _applied(whole: FullCheckpoint, deltas: Sequence[Delta]) -> "Iterator[tuple[str, torch.Tensor]]":
    # A delta compares what it is applied to and what comes of it.
    for name in deltas[-1].tensors:
        tensor = whole.get(name)
        for delta in deltas:
            tensor = delta.apply(name, tensor) if name in delta.tensors else None
        assert tensor is not None  # the last has this name
        yield name, tensor


def _require_digest(checksums: Mapping[str, str], entry: Entry, path: Path) -> None:
    if digest_of(checksums) != entry.digest:
        raise DataError(f"{path} is not the version {entry.version} that the index names")
