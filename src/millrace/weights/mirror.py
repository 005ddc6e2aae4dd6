"""Copies of a store's versions on an engine's host, each built from the version before and a delta."""

import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path

import orjson

from millrace.errors import DataError, PublishError
from millrace.weights.building import build
from millrace.weights.chain import (
    CHECKSUMS,
    PREFIX,
    Entry,
    Source,
    digest_of,
    folder_name,
    opened_version,
    read_checksums,
    way_to,
)
from millrace.weights.folder import folder_checksums

FILE_BYTES = 64 * 2**20  # of each safetensors file

logger = logging.getLogger(__name__)


class CheckpointMirror:
    """A local copy of the versions of the store at `store_url`, in `folder`. No other process may use the folder.

    All methods block. Concurrent calls run one after another. Versions that an earlier process left in the folder are
    used if they are complete.

    Raises DataError if the folder can't be used, and ImportError or ValueError if fsspec does not know the URL.

        mirror = CheckpointMirror("s3://bucket/run", Path("/scratch/weights"))
        path, digest = mirror.bring(7)  # stays until version 9 is brought
    """

    def __init__(self, store_url: str, folder: Path) -> None:
        self._source = Source(store_url)
        self._folder = folder.resolve()
        self._serial = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(f"{self._folder} can't be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DataError(f"{self._folder} is in use by another sidecar; give this one its own folder") from error
        self._digests: dict[int, str] = {}  # of the versions in the folder; the last one brought comes last
        self._verified: set[int] = set()  # the versions that this process has compared with their checksums
        self._changes: dict[int, str] = {}  # the digest of the base of each version that has a file of its changes
        self._scan()

    def bring(self, version: int) -> tuple[Path, str]:
        """Return a folder of the version in Hugging Face's format, and the digest of its checksums (`digest_of`).

        The folder is complete, and was compared with its checksums. It stays until the version after the next one is
        brought.

        Raises PublishError if the store does not have the version or can't be read, or if there is no room, and
        DataError if the store is damaged.
        """
        with self._serial:
            try:
                entries = self._source.index()
            except OSError as error:
                raise PublishError(f"{self._source.root} can't be read: {error}") from error
            known = {entry.version: entry for entry in entries}
            if version not in known:
                raise PublishError(f"{self._source.root} has no version {version}; it has {tuple(known)}")
            wanted = known[version]
            self._remove_other_runs(entries)
            if version in self._digests and version not in self._verified:
                self._verify(version)
            while version not in self._digests:
                self._build(entries, wanted)
            return self._path(version), wanted.digest

    def changes(self, version: int) -> tuple[str, str]:
        """Return the path of a file of what has changed in a version that was brought (`building.ChangesFile`), and the
        digest of the version that it has changed from; two empty texts if there is no such file. It stays as long as
        the version's folder."""
        base = self._changes.get(version)
        return ("", "") if base is None else (str(self._changes_path(version)), base)

    def close(self) -> None:
        """Release the folder. The versions stay in it."""
        os.close(self._lock)

    def _build(self, entries: tuple[Entry, ...], wanted: Entry) -> None:
        """Take one step towards the wanted version. The last step adds it to `_digests`."""
        start, deltas = way_to(entries, wanted.version, self._digests.keys())
        self._make_room(start.version)
        if start.version not in self._digests:
            self._fetch(start)
            return
        try:
            self._apply(start, deltas)
        except DataError:
            if self._verify(start.version):
                raise
            logger.warning("version %d was damaged in %s; it is built again", start.version, self._folder)

    def _fetch(self, anchor: Entry) -> None:
        """Copy a whole version from the store."""
        place = self._clear_place()
        try:
            self._source.fetch(anchor, place)
            checksums = read_checksums(place)
            if folder_checksums(place) != checksums or digest_of(checksums) != anchor.digest:
                raise DataError(f"version {anchor.version} is damaged in {self._source.root}")
            self._add(place, anchor)
        except OSError as error:
            raise self._failed(anchor, error) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _apply(self, start: Entry, deltas: list[Entry]) -> None:
        """Write a new folder beside the old one, tensor by tensor."""
        place, entry = self._clear_place(), deltas[-1]
        files = [(delta, self._folder / f".{delta.name}") for delta in deltas]
        changes = self._changes_path(entry.version)
        try:
            for delta, path in files:
                self._source.fetch(delta, path)
            whole, opened = opened_version(self._path(start.version), start, files)
            build(place, whole, opened, FILE_BYTES, changes)
            checksums = {name: tensor.checksum for name, tensor in opened[-1].tensors.items()}
            (place / CHECKSUMS).write_bytes(orjson.dumps(checksums))
            self._add(place, entry)
            if len(deltas) == 1:
                self._changes[entry.version] = start.digest
        except OSError as error:
            raise self._failed(entry, error) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for path in (*(path for _, path in files), *([] if entry.version in self._changes else [changes])):
                path.unlink(missing_ok=True)

    def _failed(self, entry: Entry, error: OSError) -> PublishError:
        return PublishError(
            f"version {entry.version} can't be copied from {self._source.root} to {self._folder}: {error}"
        )

    def _add(self, place: Path, entry: Entry) -> None:
        place.rename(self._path(entry.version))
        self._digests[entry.version] = entry.digest
        self._verified.add(entry.version)

    def _verify(self, version: int) -> bool:
        """Return whether the version's folder has the tensors that were written. If not, remove it."""
        folder = self._path(version)
        try:
            checksums = folder_checksums(folder)
        except (DataError, OSError):
            checksums = {}
        if digest_of(checksums) == self._digests[version]:
            self._verified.add(version)
            return True
        self._remove(version)
        return False

    def _make_room(self, base: int) -> None:
        """Remove all versions but one: `base`, which a version will be built from, or the last one brought."""
        kept = base if base in self._digests else next(reversed(self._digests), None)
        for version in self._digests.keys() - {kept}:
            self._remove(version)

    def _remove_other_runs(self, entries: tuple[Entry, ...]) -> None:
        """Remove versions of another run that have the number of a version in the store."""
        for entry in entries:
            if self._digests.get(entry.version, entry.digest) != entry.digest:
                self._remove(entry.version)

    def _remove(self, version: int) -> None:
        del self._digests[version]
        self._verified.discard(version)
        self._changes.pop(version, None)
        self._changes_path(version).unlink(missing_ok=True)
        shutil.rmtree(self._path(version), ignore_errors=True)

    def _scan(self) -> None:
        """Register the versions that an earlier process left, in the order of their creation, and remove incomplete
        ones."""
        for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            number = path.name.removeprefix(PREFIX)
            if path.name.startswith(PREFIX) and number.isdecimal():
                try:
                    self._digests[int(number)] = digest_of(read_checksums(path))
                except DataError:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(f".{PREFIX}"):
                path.unlink()
        self._clear_place()

    def _clear_place(self) -> Path:
        """Return an empty place to build a version in."""
        shutil.rmtree(self._folder / ".making", ignore_errors=True)
        return self._folder / ".making"

    def _path(self, version: int) -> Path:
        return self._folder / folder_name(version)

    def _changes_path(self, version: int) -> Path:
        return self._folder / f".{folder_name(version)}.changes"
