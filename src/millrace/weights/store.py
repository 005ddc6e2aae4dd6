"""The last versions of a run, where they outlive it: what an engine that joins or comes back catches up from.

A version is a folder in Hugging Face's format, below a path or a URL of fsspec's. `index.json` names the versions that
are whole and safe, and is written when their bytes are.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import orjson
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open

from millrace.checksum import tensor_checksum
from millrace.errors import DataError, PublishError
from millrace.model_folder import to_disk
from millrace.weights.folder import WrittenFolder, write_folder

if TYPE_CHECKING:
    import torch

    from millrace.weights.transports.base import NamedTensors

INDEX = "index.json"
CHECKSUMS = "checksums.json"


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    folder: str  # below the store's root


class VersionStore:
    """At `url`, for the model in `model_path`, whose config and tokenizer each version gets. The last `keep` versions
    stay. One call at a time; all of them block. Raises DataError where there is an index that can't be read."""

    def __init__(self, url: str, model_path: Path, *, keep: int) -> None:
        self._files, self._root = fsspec.url_to_fs(url)
        self._remote = not isinstance(self._files, LocalFileSystem)
        self._model_path, self._keep = model_path, keep
        self._scratch = tempfile.TemporaryDirectory(prefix="millrace-versions-") if self._remote else None
        self._here = Path(self._scratch.name) if self._scratch else Path(self._root)
        self._written: dict[int, WrittenFolder] = {}  # by this process, and there
        self._safe = self._read_index()

    @property
    def shared(self) -> bool:
        """Whether a version is a folder that others can read by its path."""
        return not self._remote

    @property
    def versions(self) -> tuple[int, ...]:
        """Those that are safe, the oldest first."""
        return tuple(version.number for version in self._safe)

    def write(self, version: int, tensors: "Iterator[NamedTensors]") -> WrittenFolder:
        """Writes `version` to a folder of this host, where this process has not done so before, and takes away what
        was written and never made safe. Raises PublishError where there is no room, or a tensor comes twice."""
        if version not in self._written:
            self._forget_from(version)
            for number in [number for number in self._written if number not in self.versions]:
                self._remove(self._written.pop(number))
            written = write_folder(self._here / _folder(version), tensors, self._model_path)
            (written.path / CHECKSUMS).write_bytes(orjson.dumps(dict(written.checksums)))
            self._written[version] = written
        return self._written[version]

    def secure(self, version: int) -> None:
        """Returns when `version`, which was written, is safe and in the index, and what is too many is gone. Raises
        PublishError where that fails."""
        written = self._written[version]
        entry = _Version(version, written.path.name)
        safe = [*self._safe, entry]
        dropped, kept = safe[: -self._keep], safe[-self._keep :]
        try:
            if self._remote:
                self._files.makedirs(f"{self._root}/{entry.folder}", exist_ok=True)
                for path in sorted(written.path.iterdir()):
                    self._files.put_file(str(path), f"{self._root}/{entry.folder}/{path.name}")
                self._remove(self._written.pop(version))
            else:
                for path in (*written.path.iterdir(), written.path, self._here):
                    to_disk(path)
            self._write_index(kept)
        except OSError as error:
            raise PublishError(f"version {version} is not safe in {self._root}: {error}") from error
        self._safe = kept
        self._drop(dropped)

    def tensors(self, version: int) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every tensor of a version that is safe, on the CPU. Raises PublishError where there is none, and where one is
        not what was written."""
        if version not in self.versions:
            raise PublishError(f"{self._root} has no version {version}; it has {self.versions}")
        folder = self._here / _folder(version)
        try:
            if self._remote:
                self._files.get(f"{self._root}/{folder.name}/", f"{folder}/", recursive=True)
            checksums = orjson.loads((folder / CHECKSUMS).read_bytes())
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no mapping)
                        tensor = file.get_tensor(name)
                        if tensor_checksum(tensor) != checksums.pop(name, None):
                            raise PublishError(f"{path}: {name} is not what was written")
                        yield name, tensor
            if checksums:
                raise PublishError(f"{folder} has lost {min(checksums)}")
        except (OSError, SafetensorError, orjson.JSONDecodeError) as error:
            raise PublishError(f"version {version} can't be read from {self._root}: {error}") from error
        finally:
            if self._remote:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """The versions stay."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _forget_from(self, version: int) -> None:
        """Versions from this one on are of a run that was resumed from before them."""
        before, later = ([one for one in self._safe if (one.number < version) is earlier] for earlier in (True, False))
        if later:
            try:
                self._write_index(before)
            except OSError as error:
                raise PublishError(f"the index of {self._root} can't be written: {error}") from error
            self._safe = before
            self._drop(later)

    def _drop(self, versions: list[_Version]) -> None:
        for one in versions:
            self._written.pop(one.number, None)
            with suppress(FileNotFoundError):
                self._files.rm(f"{self._root}/{one.folder}", recursive=True)

    def _remove(self, written: WrittenFolder) -> None:
        shutil.rmtree(written.path, ignore_errors=True)

    def _read_index(self) -> list[_Version]:
        path = f"{self._root}/{INDEX}"
        try:
            entries = orjson.loads(self._files.cat_file(path))["versions"]
            return [_Version(int(entry["version"]), str(entry["folder"])) for entry in entries]
        except FileNotFoundError:
            return []
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a store's index: {error!r}; give another publish.folder") from error

    def _write_index(self, versions: list[_Version]) -> None:
        """At once or not at all: object stores do so by themselves."""
        data = orjson.dumps({"versions": [{"version": one.number, "folder": one.folder} for one in versions]})
        if self._remote:
            self._files.pipe_file(f"{self._root}/{INDEX}", data)
            return
        partial = self._here / f".{INDEX}.partial"
        partial.write_bytes(data)
        to_disk(partial)
        partial.replace(self._here / INDEX)
        to_disk(self._here)


def _folder(version: int) -> str:
    return f"version-{version:08d}"
