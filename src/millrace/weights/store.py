"""The last versions of a run, where they outlive it: what an engine that joins or comes back catches up from.

A version is a folder in Hugging Face's format, or what changed since the version before, below a path or a URL of
fsspec's (`chain`).
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
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

# Versions, one of which is whole: an engine's host that comes new reads it and at most nine deltas.
ANCHOR_EVERY = 10

logger = logging.getLogger(__name__)


class VersionStore:
    """At `url`, for the model in `model_path`, whose config and tokenizer each version gets. The last `keep` versions
    stay, and what they are made from. One call at a time; all of them block. Raises DataError where there is an index
    that can't be read, and ConfigError where fsspec does not know the URL.

    Every `anchor_every`-th version is whole, and so is the first that this process writes; the others are deltas where
    these are smaller. For that, the last version stays whole in a folder of this host (below TMPDIR), and the next one
    beside it while it is written.
    """

    def __init__(self, url: str, model_path: Path, *, keep: int, anchor_every: int = 1) -> None:
        try:
            self._source = Source(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"publish.folder {url} can't be used: {error}") from error
        self._model_path, self._keep, self._anchor_every = model_path, keep, anchor_every
        # Apart: written to a folder of this host, and brought to the store from there.
        self._apart = not self._source.local or anchor_every > 1
        self._scratch = tempfile.TemporaryDirectory(prefix="millrace-versions-") if self._apart else None
        self._here = Path(self._scratch.name) if self._scratch else Path(self._source.root)
        self._written: dict[int, WrittenFolder] = {}  # by this process, and in the index or pending
        self._pending: Entry | None = None  # written and not safe
        self._base: int | None = None  # safe, and whole in `_here` though that is not the store
        try:
            self._safe = list(self._source.index(torn=True))
        except (DataError, OSError) as error:
            self.close()
            raise DataError(f"{error}; give another publish.folder") from error

    @property
    def shared(self) -> bool:
        """Whether a version is a folder that others can read by its path."""
        return not self._apart

    @property
    def folder(self) -> Path | None:
        """Where others can read what lies there by its path."""
        return self._here if self.shared else None

    @property
    def url(self) -> str:
        """Where others find it."""
        return str(self._source.files.unstrip_protocol(self._source.root))

    @property
    def versions(self) -> tuple[int, ...]:
        """Those that are safe, the oldest first."""
        return tuple(entry.version for entry in self._safe)

    def write(self, version: int, tensors: "Iterator[NamedTensors]") -> WrittenFolder:
        """Writes `version` to a folder of this host, where this process has not done so before, and discards what was
        never made safe. Raises PublishError where there is no room, or a tensor comes twice.

        The folder of a version that is not shared goes when the next one is safe, or with the store."""
        if version not in self._written:
            self._forget_from(version)
            self.discard()
            written = write_folder(self._here / folder_name(version), tensors, self._model_path)
            try:
                (written.path / CHECKSUMS).write_bytes(orjson.dumps(dict(written.checksums)))
                base = self._write_delta(version, written)
            except OSError as error:
                shutil.rmtree(written.path, ignore_errors=True)
                raise PublishError(f"version {version} can't be written to {self._here}: {error}") from error
            self._written[version] = written
            self._pending = Entry(version=version, base=base, digest=digest_of(written.checksums))
        return self._written[version]

    def discard(self) -> None:
        """Takes away what was written and never made safe: another version may get its number."""
        if self._pending is not None:
            shutil.rmtree(self._written.pop(self._pending.version).path, ignore_errors=True)
            self._delta_path(self._pending.version).unlink(missing_ok=True)
            self._pending = None

    def secure(self, version: int) -> None:
        """Returns when `version`, which was written, is safe and in the index, and what is too many is gone. Raises
        PublishError where that fails."""
        if version in self.versions:
            return
        entry = self._pending
        assert entry is not None, "write comes first"
        assert entry.version == version
        safe = [*self._safe, entry]
        keeping = kept(safe, self._keep)
        try:
            if self._apart:
                self._send(entry)
            else:
                folder = self._here / entry.name
                for path in (*folder.iterdir(), folder, self._here):
                    to_disk(path)
            self._write_index(keeping)
        except OSError as error:
            raise PublishError(f"version {version} is not safe in {self._source.root}: {error}") from error
        self._safe, self._pending = keeping, None
        self._drop([one for one in safe if one not in keeping])
        if self._apart:
            self._forget_base()
            self._base = version
            if self._anchor_every == 1:  # nobody needs it
                self._forget_base()

    def tensors(self, version: int) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every tensor of a version that is safe, on the CPU. Raises PublishError where there is none, and where one is
        not what was written."""
        if version not in self.versions:
            raise PublishError(f"{self._source.root} has no version {version}; it has {self.versions}")
        held = frozenset() if self._base is None else frozenset({self._base})
        anchor, deltas = way_to(self._safe, version, held)
        with tempfile.TemporaryDirectory(dir=self._here if self._apart else None) as place:
            try:
                folder = self._here / folder_name(version) if version in held else self._place(anchor, Path(place))
                changes = [(delta, self._place(delta, Path(place))) for delta in deltas]
                yield from read_version(folder, anchor, changes)
            except (OSError, DataError) as error:
                raise PublishError(f"version {version} can't be read from {self._source.root}: {error}") from error

    def close(self) -> None:
        """The versions stay."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _write_delta(self, version: int, written: WrittenFolder) -> int | None:
        """To the last safe version, if the next anchor is not due and a delta is smaller. Returns that version."""
        base = self._base
        if base is None or len(way_to(self._safe, base, frozenset())[1]) + 1 >= self._anchor_every:
            return None
        old, new = FullCheckpoint(self._here / folder_name(base)), FullCheckpoint(written.path)

        def pairs() -> Iterator[Pair]:
            for name in new.checksums:
                tensor = new.get(name)
                assert tensor is not None
                yield name, old.get(name), tensor

        path = self._delta_path(version)
        try:
            report = write_delta(path, base, version, pairs())
        except PublishError as error:
            logger.warning("version %d is kept whole: %s", version, error)
            return None
        logger.info("version %d is %d bytes since version %d, of %d", version, report.wire_nbytes, base, report.nbytes)
        if report.wire_nbytes >= report.nbytes:
            path.unlink()
            return None
        return base

    def _send(self, entry: Entry) -> None:
        """From the folder of this host to the store, where nothing of that name may be left from a run that ended in
        the middle of it."""
        files, target = self._source.files, f"{self._source.root}/{entry.name}"
        with suppress(FileNotFoundError):
            files.rm(target, recursive=True)
        if entry.base is None:
            folder = self._here / entry.name
            files.makedirs(target, exist_ok=True)
            for path in sorted(folder.iterdir()):
                files.put_file(str(path), f"{target}/{path.name}")
        else:
            files.put_file(str(self._delta_path(entry.version)), target)
            self._delta_path(entry.version).unlink()
        if self._source.local:
            there = Path(target)
            for path in (*(there.iterdir() if entry.base is None else ()), there, there.parent):
                to_disk(path)

    def _place(self, entry: Entry, place: Path) -> Path:
        """Where the version's folder or file can be read: in the store, or copied to `place`."""
        if self._source.local:
            return Path(self._source.root) / entry.name
        self._source.fetch(entry, place / entry.name)
        return place / entry.name

    def _delta_path(self, version: int) -> Path:
        return self._here / f"{folder_name(version)}.delta"

    def _forget_base(self) -> None:
        if self._base is not None:
            shutil.rmtree(self._here / folder_name(self._base), ignore_errors=True)
            self._base = None

    def _forget_from(self, version: int) -> None:
        """Versions from this one on are of a run that was resumed from before them."""
        before, later = ([one for one in self._safe if (one.version < version) is earlier] for earlier in (True, False))
        if later:
            try:
                self._write_index(before)
            except OSError as error:
                raise PublishError(f"the index of {self._source.root} can't be written: {error}") from error
            self._safe = before
            self._drop(later)

    def _drop(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._written.pop(entry.version, None)
            if entry.version == self._base:
                self._forget_base()
            with suppress(FileNotFoundError):
                self._source.files.rm(f"{self._source.root}/{entry.name}", recursive=True)

    def _write_index(self, entries: list[Entry]) -> None:
        """At once or not at all: object stores do so by themselves."""
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
