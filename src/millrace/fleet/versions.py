"""Which weights the engines should hold, and how they get them: one version at a time, kept where the config says so,
and brought to an engine that comes later."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engines.start import Started
from millrace.errors import EngineError, EngineFailed, EngineRefused, PublishError
from millrace.fleet.membership import Attested, Distrusted, Emptied, Event
from millrace.types import Capability
from millrace.weights.plan import buckets
from millrace.weights.publisher import PublishReport, publish
from millrace.weights.transports.base import PublishTarget, Transport

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore

STORE_DEADLINE = 120.0  # seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the engines are started with: the checksums of the tensors in `folder`."""

    checksums: Mapping[str, str]
    version: int
    folder: Path


class Versions:
    """The versions of one fleet. `apply` is told what each engine holds from now on."""

    def __init__(
        self,
        transport: Transport | None,
        store: "VersionStore | None",
        apply: Callable[[str, Event], Awaitable[None]],
    ) -> None:
        self.transport, self.store, self._apply = transport, store, apply
        self._sending = asyncio.Lock()  # the transport brings one version at a time
        self._securing: asyncio.Task[None] | None = None  # makes the last version safe in the store
        self._publishing = False
        self._origin: Origin | None = None
        self._last: int | None = None

    async def close(self) -> None:
        """Ends what goes on in the background, and closes transport and store."""
        try:
            await self.secured()  # which logs what went wrong
        except PublishError as error:
            logger.error("%s", error)
        if self.transport is not None:
            await self.transport.close()
        if self.store is not None:
            self.store.close()

    def begin_with(self, origin: Origin) -> None:
        """What the engines are started with."""
        self._origin, self._last = origin, origin.version

    async def publish(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        targets: Callable[[], Sequence[PublishTarget]],
        *,
        bucket_bytes: int,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """As `Fleet.publish` says. `targets` raises where there are none."""
        transport = self._ready_for(version)
        if self.store is not None and isinstance(tensors, Iterator):
            raise PublishError("each version is kept (publish.folder), and an iterator can't be gone through twice")
        engines = targets()

        self._publishing = True
        try:
            async with self._sending:
                unstored = await self.secured(deadline)
                if self.store is not None:
                    await asyncio.to_thread(self.store.discard)  # of a publish that failed
                if require_finite:
                    from millrace.weights.finite import only_finite  # imports torch

                    tensors = await asyncio.to_thread(only_finite, tensors)
                report = await self._bring(transport, engines, tensors, version, bucket_bytes, deadline)
                unstored = await self._keep(version, tensors, bucket_bytes) or unstored
        finally:
            self._publishing = False
        return replace(report, unstored=unstored)

    async def catch_up(self, started: Started, bucket_bytes: int, deadline: float) -> None:
        """Brings the engine what the others serve."""
        async with self._sending:
            await self.secured(deadline)
            name, version = started.engine.name, self._last
            if self._origin is not None and version == self._origin.version:
                try:
                    await self.compare(started, self._origin)
                except EngineError as error:
                    await self._apply(name, Distrusted(str(error)))
                    raise
            elif self.transport is not None and self.store is not None and version in self.store.versions:
                target = PublishTarget(started.engine, started.info)
                tensors = self.store.tensors(version)
                await self._bring(self.transport, [target], tensors, version, bucket_bytes, deadline)
            else:
                logger.warning("%s serves after the next publish: no store has version %s", name, version)

    async def compare(self, replica: Started, origin: Origin) -> None:
        """Takes an engine into rotation that holds these tensors: for weights that it loaded by itself. Raises
        EngineFailed for one that holds others."""
        engine = replica.engine
        if Capability.CHECKSUMS not in replica.info.capabilities:
            if replica.process is not None and Path(replica.info.model_path) == origin.folder:
                await self._apply(engine.name, Attested(origin.version))
            return
        held = await engine.checksums()
        known = held.keys() & origin.checksums.keys()
        if wrong := sorted(name for name in known if held[name] != origin.checksums[name]):
            raise EngineFailed(engine.name, f"it holds other weights than the model's folder: {', '.join(wrong[:3])}")
        if unknown := sorted(held.keys() - known):
            logger.warning("%s: not compared, the folder has no %s", engine.name, ", ".join(unknown[:3]))
        await self._apply(engine.name, Attested(origin.version))

    async def _bring(
        self,
        transport: Transport,
        targets: Sequence[PublishTarget],
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        bucket_bytes: int,
        deadline: float,
    ) -> PublishReport:
        """Publishes to these engines. Those that take the version are routable then, the others out of rotation."""
        emptied: set[str] = set()

        async def committed(name: str) -> None:
            self._last = version
            await self._apply(name, Attested(version))

        async def unrestored(name: str, error: EngineError) -> None:
            if isinstance(error, EngineRefused):
                emptied.add(name)
                await self._apply(name, Emptied())
            else:
                await self._apply(name, Distrusted(str(error)))

        report = await publish(
            targets,
            tensors,
            version,
            transport,
            bucket_bytes=bucket_bytes,
            deadline=deadline,
            committed=committed,
            unrestored=unrestored,
        )
        for engine in report.engines:
            if (error := engine.error) is None:
                continue
            logger.error("version %d: %s is out of rotation: %s", version, engine.engine, error)
            if engine.blameless:
                await self._apply(engine.engine, Emptied())
            elif not (isinstance(error, EngineRefused) and engine.engine in emptied):
                await self._apply(engine.engine, Distrusted(str(error)))
        return report

    async def _keep(self, version: int, tensors: "Iterable[tuple[str, torch.Tensor]]", bucket_bytes: int) -> str | None:
        """Writes the version, and makes it safe in the background. Returns why it can't."""
        if self.store is None:
            return None
        try:
            await asyncio.to_thread(self.store.write, version, buckets(tensors, bucket_bytes))
        except PublishError as error:
            logger.error("version %d is not kept: %s", version, error)
            return str(error)
        self._securing = asyncio.create_task(asyncio.to_thread(self.store.secure, version))
        return None

    async def secured(self, deadline: float = STORE_DEADLINE) -> str | None:
        """Waits until the last version is safe. Returns why it is not. Raises PublishError where that takes longer, and
        the store can't be used yet."""
        if self._securing is None:
            return None
        try:
            async with asyncio.timeout(deadline):
                await asyncio.shield(self._securing)
        except TimeoutError:
            raise PublishError(f"the store did not take the last version within {deadline:.0f} s more") from None
        except PublishError as error:
            logger.error("%s", error)
            self._securing = None
            return str(error)
        self._securing = None  # and not before: who waits for it may be cancelled
        return None

    def _ready_for(self, version: int) -> Transport:
        """What brings the version. Raises PublishError where it can't be published."""
        if self.transport is None:
            raise PublishError(
                "there is no way to hand tensors from this process to all of the engines; with dp_size above 1, and a "
                "vLLM that was started without Millrace's extension, they take weights from disk only: set "
                "publish.folder to a path that they and the trainer share"
            )
        if self._publishing:
            raise PublishError(f"version {version} can't be published while another version is on its way")
        if self._last is not None and version <= self._last:
            raise PublishError(f"version {version} is not newer than version {self._last}, which was published before")
        return self.transport
