"""A version store in a folder or object store: the last versions of a run, which engines that join or restart load.

A version is a folder in Hugging Face's format, or a delta to the version before (see `chain`).
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from millrace.errors import ConfigError, DataError, PublishError
from millrace.model_folder import to_disk
from millrace.weights.chain import (
    CHECKSUMS,
    INDEX,
    Entry,
    FullCheckpoint,
    Index,
    Source,
    digest_of,
    folder_name,
    kept,
    read_version,
    way_to,
)
from millrace.weights.delta import Pair, write_delta
from millrace.weights.folder import WrittenFolder, write_folder

if TYPE_CHECKING:
    import torch

    from millrace.weights.transports.base import NamedTensors

# Every tenth version is whole, so a new engine host reads one whole version and at most nine deltas.
ANCHOR_EVERY = 10

logger = logging.getLogger(__name__)


class VersionStore:
    """A version store in a folder or object store. Not safe for concurrent use; all methods block.

    A version is written in two steps: `write` writes it to this host, so that engines can load it, and `secure` makes
    it permanent and adds it to the index.

    url: a path, or any URL that fsspec knows.
    model_path: the model's folder. Its config and tokenizer are copied to each version.
    keep: the number of versions to keep. The versions that these are built from are kept too.
    anchor_every: one of this many versions is whole. The first version that this process writes is whole too. The
        others are deltas if these are smaller. To write deltas, the last version is kept whole in a temporary folder on
        this host, and so is the next version while it is written.

    Raises DataError if the store's index can't be read, and ConfigError if fsspec does not know the URL.

        store = VersionStore("s3://bucket/run", Path("model"), keep=2, anchor_every=10)
        store.write(7, buckets(model.state_dict().items(), 2**28))
        store.secure(7)
        tensors = dict(store.tensors(7))
        store.close()
    """

    def __init__(self, url: str, model_path: Path, *, keep: int, anchor_every: int = 1) -> None:
        try:
            self._source = Source(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"publish.folder {url} can't be used: {error}") from error
        self._model_path, self._keep, self._anchor_every = model_path, keep, anchor_every
        # Whether versions are written to a temporary folder on this host, and copied to the store from there.
        self._staged = not self._source.local or anchor_every > 1
        self._scratch = tempfile.TemporaryDirectory(prefix="millrace-versions-") if self._staged else None
        self._local = Path(self._scratch.name) if self._scratch else Path(self._source.root)
        self._written: dict[int, WrittenFolder] = {}  # versions that this process wrote, secured or pending
        self._pending: Entry | None = None  # the version that is written and not secured
        self._base: int | None = None  # the secured version that is whole in the temporary folder
        try:
            self._secured = list(self._source.index(torn=True))
        except (DataError, OSError) as error:
            self.close()
            raise DataError(f"{error}; set another publish.folder") from error

    @property
    def shared(self) -> bool:
        """Whether a version is a folder that other processes can read by its path."""
        return not self._staged

    @property
    def folder(self) -> Path | None:
        """The store's folder; None if the store is not `shared`."""
        return self._local if self.shared else None

    @property
    def url(self) -> str:
        """The URL that other processes can open the store with."""
        return str(self._source.files.unstrip_protocol(self._source.root))

    @property
    def versions(self) -> tuple[int, ...]:
        """The secured versions, the oldest first."""
        return tuple(entry.version for entry in self._secured)

    def is_last(self, version: int, checksums: Mapping[str, str]) -> bool:
        """Return whether this is the last secured version, with these checksums of its tensors."""
        last = self._secured[-1] if self._secured else None
        return last is not None and last.version == version and last.digest == digest_of(checksums)

    def write(self, version: int, tensors: "Iterator[NamedTensors]") -> WrittenFolder:
        """Write `version` to a folder on this host, and discard a version that was written and not secured.

        Does nothing if this process has written the version before. If the store is not `shared`, the folder is removed
        when the next version is secured, or when the store is closed.

        Raises PublishError if there is no room, or if a tensor occurs twice.
        """
        if version not in self._written:
            self._remove_from(version)
            self.discard()
            written = write_folder(self._local / folder_name(version), tensors, self._model_path)
            try:
                (written.path / CHECKSUMS).write_bytes(orjson.dumps(dict(written.checksums)))
                base = self._write_delta(version, written)
            except OSError as error:
                shutil.rmtree(written.path, ignore_errors=True)
                raise PublishError(f"version {version} can't be written to {self._local}: {error}") from error
            self._written[version] = written
            self._pending = Entry(version=version, base=base, digest=digest_of(written.checksums))
        return self._written[version]

    def discard(self) -> None:
        """Remove the version that was written and not secured. Its number can be used again."""
        if self._pending is not None:
            shutil.rmtree(self._written.pop(self._pending.version).path, ignore_errors=True)
            self._delta_path(self._pending.version).unlink(missing_ok=True)
            self._pending = None

    def secure(self, version: int) -> None:
        """Make `version`, which was written, permanent: flush it to the disk or upload it, add it to the index, and
        remove versions that are not kept. Does nothing if it is secured. Raises PublishError if that fails."""
        if version in self.versions:
            return
        entry = self._pending
        assert entry is not None, "write comes first"
        assert entry.version == version
        entries = [*self._secured, entry]
        keeping = kept(entries, self._keep)
        try:
            if self._staged:
                self._send(entry)
            else:
                folder = self._local / entry.name
                for path in (*folder.iterdir(), folder, self._local):
                    to_disk(path)
            self._write_index(keeping)
        except OSError as error:
            raise PublishError(f"version {version} can't be stored in {self._source.root}: {error}") from error
        self._secured, self._pending = keeping, None
        self._remove([entry for entry in entries if entry not in keeping])
        if self._staged:
            self._remove_base()
            self._base = version
            if self._anchor_every == 1:  # no delta will be written to it
                self._remove_base()

    def tensors(self, version: int) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield every tensor of a secured version, on the CPU. Raises PublishError if the store does not have the
        version, or if a tensor does not match its checksum."""
        if version not in self.versions:
            raise PublishError(f"{self._source.root} has no version {version}; it has {self.versions}")
        local = frozenset() if self._base is None else frozenset({self._base})
        anchor, deltas = way_to(self._secured, version, local)
        with tempfile.TemporaryDirectory(dir=self._local if self._staged else None) as place:
            try:
                folder = self._local / folder_name(version) if version in local else self._readable(anchor, Path(place))
                changes = [(delta, self._readable(delta, Path(place))) for delta in deltas]
                yield from read_version(folder, anchor, changes)
            except (OSError, DataError) as error:
                raise PublishError(f"version {version} can't be read from {self._source.root}: {error}") from error

    def close(self) -> None:
        """Remove the temporary folder. The versions stay in the store."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _write_delta(self, version: int, written: WrittenFolder) -> int | None:
        """Write a delta to the last secured version, and return that version. Return None if the next version should be
        whole, because an anchor is due or a delta is not smaller."""
        base = self._base
        if base is None or len(way_to(self._secured, base, frozenset())[1]) + 1 >= self._anchor_every:
            return None
        old, new = FullCheckpoint(self._local / folder_name(base)), FullCheckpoint(written.path)

        def pairs() -> Iterator[Pair]:
            for name in new.checksums:
                tensor = new.get(name)
                assert tensor is not None
                yield name, old.get(name), tensor

        path = self._delta_path(version)
        try:
            report = write_delta(path, base, version, pairs())
        except PublishError as error:
            logger.warning("version %d is stored whole: %s", version, error)
            return None
        logger.info("the delta %d -> %d has %d of %d bytes", base, version, report.wire_nbytes, report.nbytes)
        if report.wire_nbytes >= report.nbytes:
            path.unlink()
            return None
        return base

    def _send(self, entry: Entry) -> None:
        """Copy a version from the temporary folder to the store. First remove what an interrupted run left there."""
        files, target = self._source.files, f"{self._source.root}/{entry.name}"
        with suppress(FileNotFoundError):
            files.rm(target, recursive=True)
        if entry.base is None:
            folder = self._local / entry.name
            files.makedirs(target, exist_ok=True)
            for path in sorted(folder.iterdir()):
                files.put_file(str(path), f"{target}/{path.name}")
        else:
            files.put_file(str(self._delta_path(entry.version)), target)
            self._delta_path(entry.version).unlink()
        if self._source.local:
            stored = Path(target)
            for path in (*(stored.iterdir() if entry.base is None else ()), stored, stored.parent):
                to_disk(path)

    def _readable(self, entry: Entry, place: Path) -> Path:
        """Return a local path of the version's folder or file. If the store is remote, it is copied to `place`."""
        if self._source.local:
            return Path(self._source.root) / entry.name
        self._source.fetch(entry, place / entry.name)
        return place / entry.name

    def _delta_path(self, version: int) -> Path:
        return self._local / f"{folder_name(version)}.delta"

    def _remove_base(self) -> None:
        if self._base is not None:
            shutil.rmtree(self._local / folder_name(self._base), ignore_errors=True)
            self._base = None

    def _remove_from(self, version: int) -> None:
        """Remove this version and later ones. They are there if the run was resumed from an earlier version."""
        before = [entry for entry in self._secured if entry.version < version]
        later = self._secured[len(before) :]
        if later:
            try:
                self._write_index(before)
            except OSError as error:
                raise PublishError(f"the index of {self._source.root} can't be written: {error}") from error
            self._secured = before
            self._remove(later)

    def _remove(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._written.pop(entry.version, None)
            if entry.version == self._base:
                self._remove_base()
            with suppress(FileNotFoundError):
                self._source.files.rm(f"{self._source.root}/{entry.name}", recursive=True)

    def _write_index(self, entries: list[Entry]) -> None:
        """Write the index atomically. Object stores write every file atomically."""
        data = Index(versions=tuple(entries)).model_dump_json(exclude_none=True).encode()
        if not self._source.local:
            self._source.files.pipe_file(f"{self._source.root}/{INDEX}", data)
            return
        root = Path(self._source.root)
        partial = root / f".{INDEX}.partial"
        partial.write_bytes(data)
        to_disk(partial)
        partial.replace(root / INDEX)
        to_disk(root)
