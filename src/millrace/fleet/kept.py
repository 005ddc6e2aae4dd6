"""The record of engines that outlive their owner, and how the next owner takes them over.

The record is the file `engines.json` in a folder. It has the engines' addresses, keys and processes, and the version
that each of them holds. No version is recorded while an update is open, so an engine whose owner died in an update has
none.
"""

import logging
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from millrace.config.engines import EmbeddedEngineConfig, EngineConfig
from millrace.engines.reach import Address, address_of, take_over
from millrace.engines.start import Replica
from millrace.errors import ConfigError, DataError, EngineError
from millrace.fleet.labels import Label
from millrace.fleet.replica_state import ReplicaState
from millrace.launch.claims import claimed
from millrace.launch.nodes import Nodes
from millrace.launch.process import Server, ServerProcess
from millrace.launch.takeover import TakenOver, start_of
from millrace.types import MemoryTag

FILE = "engines.json"

logger = logging.getLogger(__name__)


class Guarded(BaseModel):
    """One server. pid, started: of its guard (`start_of`)."""

    model_config = ConfigDict(extra="forbid")

    pid: int
    started: str
    log: Path


class Recorded(Guarded):
    """One engine. others: the further servers of an engine that is several. version: the whole version that it holds
    and serves."""

    address: Address
    others: tuple[Guarded, ...] = ()
    kv_events: str | None
    gpus: tuple[str, ...] = ()
    version: int | None = None
    asleep: frozenset[MemoryTag] = frozenset()


class Content(BaseModel):
    """The content of the file. claim: the claim that the owner holds. settings: a digest of the engines' settings."""

    model_config = ConfigDict(extra="forbid")

    claim: str
    settings: str
    labels: dict[int, Label] = {}
    engines: dict[str, Recorded] = {}


class KeptEngines:
    """The engines that outlive their owner, in the process that owns them. Open it with `open`.

    `labels`: the labels of versions that earlier owners published.
    """

    def __init__(self, folder: Path, seconds: float, settings: str) -> None:
        self._path, self._seconds = folder / FILE, seconds
        self._content = self._read(settings)
        self._left = dict(self._content.engines)  # by an earlier owner, until each is taken over or ended
        self._same = self._content.settings == settings
        if not self._same:
            self._content.labels = {}
        self._content.settings, self._content.engines = settings, {}
        self._updating: int | None = None  # the version that is being published
        self.labels: Mapping[int, Label] = self._content.labels

    @classmethod
    @contextmanager
    def open(cls, folder: Path, seconds: float, config: EngineConfig, model: Path) -> Iterator["KeptEngines"]:
        """Own the engines that are recorded in `folder`, while the context is open.

        `seconds`: how long the engines run without an owner. The caller ends them. At the end, the file is removed.

        Raises ConfigError if such engines can't be kept, LaunchError if another process owns them, and DataError if the
        record can't be read or written.
        """
        if config.urls is not None:
            raise ConfigError(
                "keep_running is for engines that Millrace starts; those at engine.urls outlive it anyway"
            )
        if config.launch != "local":
            raise ConfigError(f"keep_running is for engines on this host, and engine.launch is {config.launch}")
        if not isinstance(config, EmbeddedEngineConfig) and config.nnodes > 1:
            raise ConfigError("keep_running does not work for an engine over several nodes")
        settings = sha256(f"{model.resolve()} {config.model_dump_json(exclude={'replicas'})}".encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} can't be used to keep engines running: {error.strerror}") from error
        place = sha256(os.fsencode(folder.resolve())).hexdigest()[:32]

        def refusal(holder: str) -> str:
            return f"{holder} owns the engines that are recorded in {folder}; follow its fleet, or end it first"

        with claimed(f"millrace-engines-of-{place}", refusal):
            kept = cls(folder, seconds, settings)
            with claimed(kept._content.claim, refusal):
                try:
                    yield kept
                finally:
                    if not kept._left:  # otherwise the fleet was not opened, and its engines run on
                        kept._path.unlink(missing_ok=True)

    @property
    def left(self) -> Collection[str]:
        """The names of the engines that an earlier owner left, and that are neither taken over nor ended yet."""
        return self._left.keys()

    async def take_over(self, name: str) -> Replica | None:
        """Return the recorded engine of this name if it is as it was left. Otherwise end it, and return None."""
        if (left := self._left.get(name)) is None:
            return None
        process = await find(name, left)
        if process is None:
            del self._left[name]
            return None
        reason = None if self._same else "the settings or the model's folder have changed"
        if left.asleep:
            reason = "its memory is released"
        if reason is None:
            try:
                replica = await take_over(left.address, process, left.kv_events, left.gpus, left.version)
            except EngineError as error:
                reason = str(error)
            else:
                del self._left[name]
                self._content.engines[name] = left
                logger.info("%s was taken over from an earlier owner (process %d)", name, left.pid)
                return replica
        logger.warning("%s, which an earlier owner left, is ended: %s", name, reason)
        await process.end()
        del self._left[name]
        return None

    async def keep(self, replica: Replica) -> None:
        """Record an engine that was started here. It outlives this process from now on."""
        name, process, address = replica.engine.name, replica.process, address_of(replica)
        servers = process.processes if isinstance(process, Nodes) else (process,)
        assert address is not None
        guarded = []
        for server in servers:
            assert isinstance(server, ServerProcess)
            started = start_of(server.pid)
            if started is None:  # it has ended, and the fleet will notice
                return
            guarded.append(Guarded(pid=server.pid, started=started, log=server.log_path.absolute()))
        first, *others = guarded
        self._content.engines[name] = Recorded(
            **dict(first),
            others=tuple(others),
            address=address,
            kv_events=replica.kv_events,
            gpus=replica.info.gpus,
        )
        self._write()
        for server in servers:
            assert isinstance(server, ServerProcess)
            await server.keep(self._content.claim, self._seconds)

    async def end_others(self) -> None:
        """End the recorded engines that were not taken over."""
        for name, left in list(self._left.items()):
            if (process := await find(name, left)) is not None:
                logger.warning("%s, which an earlier owner left, is ended: it is not used any more", name)
                await process.end()
            del self._left[name]

    def changed(self, state: ReplicaState) -> None:
        """Record the state of an engine. Must be called before an engine whose state changes serves, or sleeps."""
        if (recorded := self._content.engines.get(state.name)) is None:
            return
        holds = state.version if state.lora is None else None
        if self._updating not in (None, holds):
            holds = None
        if (recorded.version, recorded.asleep) != (holds, state.asleep):
            recorded.version, recorded.asleep = holds, state.asleep
            self._rewrite()

    def forget(self, name: str) -> None:
        """Record that an engine has left, so that the next owner does not look for it."""
        if self._content.engines.pop(name, None) is not None:
            self._rewrite()

    def publishing(self, version: int) -> None:
        """Record that engines are being updated to this version. Raises DataError if that fails."""
        self._updating = version
        for recorded in self._content.engines.values():
            recorded.version = None
        self._write()

    def published(self, states: Iterable[ReplicaState], labels: Mapping[int, Label]) -> None:
        """Record that the update has ended, and how the engines stand."""
        self._updating = None
        self._content.labels = dict(labels)
        for state in states:
            self.changed(state)
        self._rewrite()

    def _read(self, settings: str) -> Content:
        try:
            return Content.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return Content(claim=f"millrace-owner-{secrets.token_hex(16)}", settings=settings)
        except OSError as error:
            raise DataError(f"{self._path} can't be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            reason = f"{where}: {first['msg']}"
            raise DataError(f"{self._path} is not a record of engines ({reason}); remove it") from error

    def _rewrite(self) -> None:
        """Write the file, or remove it if that fails: the next owner must not believe what is no longer true."""
        try:
            self._write()
        except DataError as error:
            logger.error("no process can take over the engines: %s", error)
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write the file atomically. Only this user can read it, since it has keys."""
        content = self._content.model_copy(update={"engines": {**self._left, **self._content.engines}})
        partial = self._path.with_suffix(".partial")
        try:
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content.model_dump_json().encode())
            partial.replace(self._path)
        except OSError as error:
            raise DataError(f"{self._path} can't be written: {error.strerror}") from error


async def find(name: str, left: Recorded) -> Server | None:
    """Return the servers of a recorded engine, or None if one has ended. Then the others are ended too."""
    found = [TakenOver.find(name, one.pid, one.started, one.log) for one in (left, *left.others)]
    running = [one for one in found if one is not None]
    process = running[0] if len(found) == len(running) == 1 else Nodes(name, running)
    if len(running) == len(found):
        return process
    if running:
        logger.warning("%s, which an earlier owner left, is ended: one of its servers has ended", name)
        await process.end()
    return None
