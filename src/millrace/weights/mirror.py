"""Whole versions on an engine's host, each made of the one before and what has changed since."""

import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path

import orjson

from millrace.errors import DataError, PublishError
from millrace.weights.chain import (
    CHECKSUMS,
    PREFIX,
    Entry,
    Source,
    digest_of,
    folder_name,
    read_checksums,
    read_version,
    way_to,
)
from millrace.weights.folder import folder_checksums, write_folder
from millrace.weights.plan import buckets

FILE_BYTES = 64 * 2**20  # of a folder's safetensors files; up to four of them are in memory while one is written

logger = logging.getLogger(__name__)


class CheckpointMirror:
    """Of the store at `store_url`, below `folder`, which belongs to this object alone. All methods block; a second call
    waits for the first. What an earlier process left there is used where it is whole. Raises DataError where the folder
    can't be used, and what `Source` raises."""

    def __init__(self, store_url: str, folder: Path) -> None:
        self._source = Source(store_url)
        self._folder = folder.resolve()
        self._turn = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(f"{self._folder} can't be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DataError(f"{self._folder} is in use by another sidecar; give this one its own") from error
        self._held: dict[int, str] = {}  # their digests; the last one brought comes last
        self._compared: set[int] = set()  # by this process
        self._take_stock()

    def bring(self, version: int) -> tuple[Path, str]:
        """A folder of that version in Hugging Face's format, whole and compared with its checksums, and their digest
        (`digest_of`). The folder stays while the next version is brought, and until the one after that is asked for.

        Raises PublishError where the store does not have the version or can't be read, or here is no room; DataError
        where what the store has is damaged."""
        with self._turn:
            try:
                entries = self._source.index()
            except OSError as error:
                raise PublishError(f"{self._source.root} can't be read: {error}") from error
            known = {entry.version: entry for entry in entries}
            if version not in known:
                raise PublishError(f"{self._source.root} has no version {version}; it has {tuple(known)}")
            wanted = known[version]
            self._forget_others(entries)
            if version in self._held and version not in self._compared:
                self._compare(version)
            while version not in self._held:
                self._make(entries, wanted)
            return self._path(version), wanted.digest

    def close(self) -> None:
        """The folders stay."""
        os.close(self._lock)

    def _make(self, entries: tuple[Entry, ...], wanted: Entry) -> None:
        """Takes one step towards the wanted version, the last of which leaves it in `_held`."""
        start, deltas = way_to(entries, wanted.version, self._held.keys())
        self._make_room(start.version)
        if start.version not in self._held:
            self._fetch(start)
            return
        try:
            self._apply(start, deltas)
        except DataError:
            if self._compare(start.version):
                raise
            logger.warning("version %d was damaged in %s; it is made anew", start.version, self._folder)

    def _fetch(self, anchor: Entry) -> None:
        place = self._clear_place()
        try:
            self._source.fetch(anchor, place)
            checksums = read_checksums(place)
            if folder_checksums(place) != checksums or digest_of(checksums) != anchor.digest:
                raise DataError(f"version {anchor.version} is damaged in {self._source.root}")
            self._take(place, anchor)
        except OSError as error:
            raise self._failed(anchor, error) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _apply(self, start: Entry, deltas: list[Entry]) -> None:
        """The new folder beside the old one, tensor by tensor."""
        place, entry = self._clear_place(), deltas[-1]
        files = [(delta, self._folder / f".{delta.name}") for delta in deltas]
        try:
            for delta, path in files:
                self._source.fetch(delta, path)
            tensors = read_version(self._path(start.version), start, files)
            written = write_folder(place, buckets(tensors, FILE_BYTES), self._path(start.version))
            if digest_of(written.checksums) != entry.digest:
                raise DataError(f"version {entry.version} was damaged on its way into {self._folder}")
            (place / CHECKSUMS).write_bytes(orjson.dumps(dict(written.checksums)))
            self._take(place, entry)
        except OSError as error:
            raise self._failed(entry, error) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for _, path in files:
                path.unlink(missing_ok=True)

    def _failed(self, entry: Entry, error: OSError) -> PublishError:
        return PublishError(
            f"version {entry.version} can't be brought from {self._source.root} to {self._folder}: {error}"
        )

    def _take(self, place: Path, entry: Entry) -> None:
        place.rename(self._path(entry.version))
        self._held[entry.version] = entry.digest
        self._compared.add(entry.version)

    def _compare(self, version: int) -> bool:
        """Whether the folder holds what was written. If not, it is taken away."""
        folder = self._path(version)
        try:
            checksums = folder_checksums(folder)
        except (DataError, OSError):
            checksums = {}
        if digest_of(checksums) == self._held[version]:
            self._compared.add(version)
            return True
        self._forget(version)
        return False

    def _make_room(self, base: int) -> None:
        """Before a version is made there is one other: the one that it is made of, or the last one brought."""
        stays = base if base in self._held else next(reversed(self._held), None)
        for version in self._held.keys() - {stays}:
            self._forget(version)

    def _forget_others(self, entries: tuple[Entry, ...]) -> None:
        """Of the versions here, those of another run's that have a number of the store's."""
        for entry in entries:
            if self._held.get(entry.version, entry.digest) != entry.digest:
                self._forget(entry.version)

    def _forget(self, version: int) -> None:
        del self._held[version]
        self._compared.discard(version)
        shutil.rmtree(self._path(version), ignore_errors=True)

    def _take_stock(self) -> None:
        """Of what an earlier process left, in the order in which it came; what is not whole is taken away."""
        for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            number = path.name.removeprefix(PREFIX)
            if path.name.startswith(PREFIX) and number.isdecimal():
                try:
                    self._held[int(number)] = digest_of(read_checksums(path))
                except DataError:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(f".{PREFIX}"):
                path.unlink()
        self._clear_place()

    def _clear_place(self) -> Path:
        """Where a version is made."""
        for name in (".making", "..making.partial"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        return self._folder / ".making"

    def _path(self, version: int) -> Path:
        return self._folder / folder_name(version)
