"""The LoRA adapters loaded on the engines of a fleet: the requests that use them, and when they are unloaded."""

import asyncio
import itertools
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engines.base import PUBLISHED_LORA, Engine
from millrace.errors import (
    EngineError,
    EngineFailed,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    LocalError,
    PublishError,
)
from millrace.fleet.replica_state import Attested, Based, Event, Quarantined
from millrace.launch.ports import is_here
from millrace.model_folder import has_weights, stored_tensors
from millrace.types import Capability, LoraConfig
from millrace.weights.lora import WrittenLora, check_lora, check_values, lora_folder, sweep, write_lora
from millrace.weights.report import EngineReport
from millrace.weights.source import WeightSource
from millrace.weights.transports.base import PublishTarget

if TYPE_CHECKING:
    import torch

MOST_LOADED = 2  # on one engine: the current adapter, and the one that earlier requests still use
UNLOAD_DEADLINE = 30.0  # seconds; only an engine that hangs takes that long
CLOSE_DEADLINE = 5.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Loaded:
    """One adapter on one engine.

    `users`: the ids of the requests that use it. `leaving`: the task that unloads it when the last of them has ended.
    """

    engine: Engine
    lora: WrittenLora
    users: list[str] = field(default_factory=list)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Legs:
    """Seconds that an engine took to make room for an adapter, to load it, and to attest it."""

    room: float
    load: float
    attest: float


class PublishedLoras:
    """The adapters that a fleet has published.

    `folder`: a folder that the engines' hosts can read. Without it, all engines must be on this host. `apply` is called
    with the event when the adapter of an engine changes.
    """

    def __init__(self, folder: Path | None, apply: Callable[[str, Event], Awaitable[None]]) -> None:
        self._folder, self._apply = folder, apply
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._loaded: dict[str, dict[str, Loaded]] = {}  # by the engine's name and the adapter's
        self._coming: Path | None = None  # being written or loaded
        self.current: WrittenLora | None = None  # over the last whole version

    @asynccontextmanager
    async def written(
        self,
        targets: Sequence[PublishTarget],
        version: int,
        tensors: "Mapping[str, torch.Tensor]",
        config: LoraConfig,
    ) -> AsyncIterator[WrittenLora]:
        """Write an adapter to a folder that all these engines can read, and open a context to load it.

        The folder stays as long as an engine has the adapter. Raises PublishError if an engine can't read it.
        """
        place, name = self._place(targets), f"{PUBLISHED_LORA}{version}-{secrets.token_hex(4)}"
        self._coming = lora_folder(place, version)
        try:
            yield await asyncio.to_thread(write_lora, place, name, version, tensors, config)
        finally:
            self._coming = None
            self._sweep()

    def _place(self, targets: Sequence[PublishTarget]) -> Path:
        if self._folder is not None:
            return self._folder
        if away := [target.engine.name for target in targets if not is_here(target.engine.url)]:
            raise PublishError(
                f"{', '.join(away)} can't read files of this host; set publish.folder to a path that the engines and "
                "the trainer share"
            )
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="millrace-adapters-")
            Path(self._scratch.name).chmod(0o755)  # the engines' user may be another
        return Path(self._scratch.name)

    @contextmanager
    def using(self, engine: str, lora: str | None, request_id: str) -> Iterator[None]:
        """Return a context that keeps the adapter loaded."""
        loaded = self._loaded.get(engine, {}).get(lora or "")
        if loaded is None:  # no adapter, or a whole version has just removed it
            yield
            return
        loaded.users.append(request_id)
        loaded.idle.clear()
        try:
            yield
        finally:
            loaded.users.remove(request_id)
            if not loaded.users:
                loaded.idle.set()

    async def lay_over(
        self,
        targets: Sequence[PublishTarget],
        lora: WrittenLora,
        base: int | None,
        bases: Mapping[str, int | None],
        ends: float,
    ) -> list[EngineReport]:
        """Load an adapter on these engines, over the whole version `base`, and report on each engine.

        bases: the whole version that each engine holds, by the engine's name.
        ends: the deadline, as a value of time.monotonic.

        Engines that load it serve it. The others leave rotation. If no engine loads it, PublishError is raised, and the
        engines stay as they were.
        """
        reports: dict[str, EngineReport] = {}

        async def one(target: PublishTarget) -> None:
            name = target.engine.name
            try:
                if base is None or bases[name] != base:
                    raise EngineRefused(
                        name,
                        "it does not hold the whole version that the adapter is for; publish a whole version first",
                    )
                legs = await self.load(target, lora, ends)
            except EngineError as error:
                reports[name] = EngineReport(name, error, False, 0.0, 0.0, 0.0, 0.0, 0.0)
                return
            reports[name] = EngineReport(name, None, False, legs.room, legs.load, legs.attest, 0.0, 0.0)
            self.current = lora
            await self._apply(name, Attested(lora.version, lora.name))
            self.retire(name, keep=lora.name)

        async with asyncio.TaskGroup() as group:
            for target in targets:
                group.create_task(one(target))
        failed = {name: report.error for name, report in reports.items() if report.error is not None}
        if len(failed) == len(targets):
            reasons = "; ".join(map(str, failed.values()))
            raise PublishError(f"no engine took the adapter of version {lora.version}: {reasons}")
        for name, error in failed.items():
            logger.error("version %d: %s is out of rotation: %s", lora.version, name, error)
            held = bases[name]
            if not isinstance(error, EngineRefused | LocalError):
                await self._apply(name, Quarantined(str(error)))
            elif held is not None:
                await self._apply(name, Based(held))
                self.retire(name, keep=None)
        return [reports[target.engine.name] for target in targets]

    async def load(self, target: PublishTarget, lora: WrittenLora, ends: float) -> Legs:
        """Load an adapter on an engine, beside the current one, and compare its checksums if the engine reports them.

        `ends`: the deadline, as a value of time.monotonic. Raises EngineError; the engine then has the adapters that it
        had before.
        """
        engine = target.engine
        times = [time.monotonic()]
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                await self._make_room(engine, ends)
                times.append(time.monotonic())
                await engine.load_lora(lora.name, str(lora.path), deadline=ends - time.monotonic())
                times.append(time.monotonic())
                held = lora.checksums
                if target.can(Capability.CHECKSUMS):
                    held = await engine.lora_checksums(lora.name)
                if wrong := sorted(name for name, value in lora.checksums.items() if held.get(name) != value):
                    raise EngineFailed(engine.name, f"its {wrong[0]} is not what was sent")
                times.append(time.monotonic())
        except BaseException as error:
            if isinstance(error, TimeoutError):
                raise EngineTimeout(engine.name, f"it did not load adapter {lora.version} in time") from error
            if len(times) > 1 and not isinstance(error, EngineTimeout | EngineUnreachable):
                with suppress(EngineError):  # most engines have not loaded it
                    await engine.unload_lora(lora.name, deadline=CLOSE_DEADLINE)
            raise
        loaded = Loaded(engine, lora)
        loaded.idle.set()
        self._loaded.setdefault(engine.name, {})[lora.name] = loaded
        return Legs(*(later - earlier for earlier, later in itertools.pairwise(times)))

    def retire(self, engine: str, *, keep: str | None, at_once: bool = False) -> None:
        """Unload every adapter of the engine but `keep`, each when its last request has ended.

        `at_once`: do not wait for requests, since a whole version has removed the adapters.
        """
        for loaded in self._loaded.get(engine, {}).values():
            if at_once:
                loaded.idle.set()
            if loaded.lora.name != keep and loaded.leaving is None:
                loaded.leaving = asyncio.create_task(self._unload(loaded))

    def forget(self, engine: str) -> None:
        """Forget the adapters of an engine that has ended."""
        for loaded in self._loaded.pop(engine, {}).values():
            if loaded.leaving is not None:
                loaded.leaving.cancel()
        self._sweep()

    async def close(self) -> None:
        """Unload all adapters, since external servers keep running. Engines that do not answer are ignored."""
        remaining = [loaded for one in self._loaded.values() for loaded in one.values()]
        leaving = [loaded.leaving for loaded in remaining if loaded.leaving is not None]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.gather(*(self._unload_at_once(loaded) for loaded in remaining))
        if self._scratch is not None:
            self._scratch.cleanup()

    async def _unload_at_once(self, loaded: Loaded) -> None:
        with suppress(EngineError):
            await loaded.engine.unload_lora(loaded.lora.name, deadline=CLOSE_DEADLINE)

    async def _make_room(self, engine: Engine, ends: float) -> None:
        """Wait until the engine has room for one more adapter.

        Requests that still use an older adapter after half of the time are aborted. They keep their tokens.
        """
        self.retire(engine.name, keep=self.current.name if self.current is not None else None)
        held = self._loaded.get(engine.name, {})
        patience = time.monotonic() + (ends - time.monotonic()) / 2
        while len(held) >= MOST_LOADED:
            leaving = [(loaded, loaded.leaving) for loaded in held.values() if loaded.leaving is not None]
            left = max(patience - time.monotonic(), 0.0)
            await asyncio.wait([task for _, task in leaving], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if time.monotonic() >= patience and len(held) >= MOST_LOADED:
                stragglers = [request_id for loaded, _ in leaving for request_id in loaded.users]
                logger.warning(
                    "%s: %d requests are aborted, to make room for a new adapter", engine.name, len(stragglers)
                )
                await asyncio.gather(*(engine.abort(request_id) for request_id in stragglers))
                patience = ends

    async def _unload(self, loaded: Loaded) -> None:
        """Unload an adapter when its last request has ended."""
        await loaded.idle.wait()
        try:
            await loaded.engine.unload_lora(loaded.lora.name, deadline=UNLOAD_DEADLINE)
        except EngineError as error:
            logger.warning("adapter %d is no longer used, but could not be unloaded: %s", loaded.lora.version, error)
        self._loaded.get(loaded.engine.name, {}).pop(loaded.lora.name, None)
        self._sweep()

    def _sweep(self) -> None:
        """Delete the folders that no engine needs any more."""
        place = Path(self._scratch.name) if self._scratch is not None else self._folder
        if place is not None:
            needed: set[Path | None] = {one.lora.path for held in self._loaded.values() for one in held.values()}
            sweep(place, needed | {self._coming, self.current.path if self.current is not None else None})


def read_lora(
    source: WeightSource, config: LoraConfig, targets: Sequence[PublishTarget], folder: Path
) -> "dict[str, torch.Tensor]":
    """Return an adapter's tensors, by name. `folder`: the model's, which may not exist on this host.

    Raises PublishError if the engines take no adapters, or if the tensors are no adapter of the model.
    """
    if lacking := [target.engine.name for target in targets if not target.can(Capability.LORA)]:
        raise PublishError(
            f"{', '.join(lacking)} can't take adapters; SGLang and vLLM need engine_args: {{enable_lora: true}}"
        )
    named = list(source)
    tensors = dict(named)
    if len(tensors) < len(named):
        raise PublishError("the trainer named a tensor twice")
    known = stored_tensors(folder) if has_weights(folder) else None
    base = {name: tensor.shape for name, tensor in known.items()} if known is not None else None
    check_lora({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, base)
    check_values(tensors)
    return tensors
