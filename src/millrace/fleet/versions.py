"""Which weights the engines should hold, and how they get them: one version at a time, kept where the config says so,
and brought to an engine that comes later."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.engines.start import Replica
from millrace.errors import (
    DataError,
    EngineError,
    EngineFailed,
    EngineRefused,
    LocalError,
    MillraceError,
    PublishError,
    WeightsChanged,
)
from millrace.fleet.lora import PublishedLoras
from millrace.fleet.replica_state import Attested, Based, Event, Quarantined, WeightsLost, verdict
from millrace.fleet.republish import Republishable, Tensors, republishable, require_pairs
from millrace.imports import needs_extra
from millrace.model_folder import has_weights, stored_tensors
from millrace.types import Capability, LoraConfig
from millrace.weights.cast import Dtypes, cast, dtypes_of
from millrace.weights.fingerprint import Fingerprint
from millrace.weights.folder import FolderTensors
from millrace.weights.lora import WrittenLora, check_lora, check_values
from millrace.weights.plan import buckets
from millrace.weights.publisher import Outcome, Publish
from millrace.weights.report import EngineReport, PublishReport
from millrace.weights.transports.base import PublishTarget, Transport
from millrace.weights.transports.folder import FolderTransport

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore
    from millrace.weights.trained import Trained

STORE_DEADLINE = 120.0  # seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the engines are started with: the tensors in `folder`, and their checksums in the engines' `dtypes`."""

    checksums: Mapping[str, str]
    version: int
    folder: Path
    dtypes: Dtypes


class Versions:
    """The versions of one fleet. `apply` is told what each engine holds from now on. `frozen`: it is for ever the one
    that the engines are started with."""

    def __init__(
        self,
        transport: Transport | None,
        store: "VersionStore | None",
        apply: Callable[[str, Event], Awaitable[None]],
        *,
        frozen: bool = False,
    ) -> None:
        self.transport, self.store, self._apply, self.frozen = transport, store, apply, frozen
        self.changing = asyncio.Lock()  # held while weights or memory of engines change: one change at a time
        self._securing: asyncio.Task[None] | None = None  # makes the last version safe in the store
        self._publishing = False
        self._first_held: dict[str, Mapping[str, str]] = {}  # by engines of a frozen fleet, in their own layouts
        self._origin: Origin | None = None
        self._trained: Trained | None = None  # read when the first version is published
        self._last: int | None = None  # a whole one, or an adapter
        self._base: int | None = None  # the last whole one
        self._held: Republishable | None = None  # by the trainer, as far as is known
        self.loras = PublishedLoras(store.folder if store is not None else None)

    async def close(self) -> None:
        """Ends what goes on in the background, and closes transport and store."""
        try:
            await self.secured()  # which logs what went wrong
        except PublishError as error:
            logger.error("%s", error)
        await self.loras.close()
        if self.transport is not None:
            await self.transport.close()
        if self.store is not None:
            self.store.close()

    @property
    def published(self) -> bool:
        """Whether a whole version was published, beside what the engines were started with."""
        return self._base is not None and (self._origin is None or self._base != self._origin.version)

    @property
    def publishing(self) -> bool:
        """Whether a version is on its way."""
        return self._publishing

    @property
    def dtypes(self) -> Dtypes | None:
        return self._origin.dtypes if self._origin is not None else None

    def begin_with(self, origin: Origin) -> None:
        """What the engines are started with."""
        self._origin, self._last, self._base = origin, origin.version, origin.version

    async def publish_whole(
        self,
        given: "Tensors | Callable[[], Tensors]",
        version: int,
        targets: Callable[[], Sequence[PublishTarget]],
        *,
        bucket_bytes: int,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """As `Fleet.publish` says. `targets` raises where there are none."""
        self._require_next(version)
        held = republishable(given, version)
        tensors = held.tensors() if held is not None else require_pairs(given)
        transport = self._require_transport()
        if self.store is not None and isinstance(tensors, Iterator):
            raise PublishError(
                "each version is kept (publish.folder), and an iterator can't be gone through twice; publish "
                "list(model.named_parameters())"
            )
        engines = targets()

        async with self._alone():
            unstored = await self.secured(deadline)
            if self.store is not None:
                await asyncio.to_thread(self.store.discard)  # of a publish that failed
            tensors = await asyncio.to_thread(self._as_checkpoint, tensors, engines, require_finite)
            fingerprint = held.fingerprint if held is not None else None
            report = await self._bring(
                transport, engines, tensors, Attested(version), bucket_bytes, deadline, fingerprint
            )
            self._held = held
            unstored = await self._keep(version, tensors, bucket_bytes) or unstored
        return replace(report, unstored=unstored)

    async def publish_lora(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        targets: Callable[[], Sequence[PublishTarget]],
        bases: Callable[[], Mapping[str, int | None]],
        *,
        config: LoraConfig,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """As `Fleet.publish_lora` says. `bases`: which whole version each engine holds."""
        self._require_next(version)
        require_pairs(tensors)
        engines, started = targets(), time.monotonic()
        async with self._alone():
            named = await asyncio.to_thread(self._checked, tensors, config, engines, require_finite)
            async with self.loras.written(engines, version, named, config) as lora:
                staged = time.monotonic() - started
                reports = await self._lay_over(engines, lora, bases(), started + deadline)
        return PublishReport(version, lora.nbytes, time.monotonic() - started, staged, tuple(reports))

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """No other version is published meanwhile, and no engine catches up."""
        self._publishing = True
        try:
            async with self.changing:
                yield
        finally:
            self._publishing = False

    async def catch_up(self, started: Replica, bucket_bytes: int, deadline: float) -> None:
        """Brings the engine what the others serve: the last whole version, and the adapter over it. The caller holds
        `changing`."""
        ends = time.monotonic() + deadline
        await self.secured(deadline)
        name, base, lora = started.engine.name, self._base, self.loras.current
        assert base is not None or lora is None
        if base is None:
            return
        brought = Attested(base) if lora is None else Based(base)
        target = PublishTarget(started.engine, started.info)
        if self._origin is not None and base == self._origin.version:
            try:
                await self.compare(started, self._origin, brought)
            except EngineError as error:
                await self._apply(name, verdict(error))
                raise
        elif self.transport is not None and self.store is not None and base in self.store.versions:
            tensors = self.store.tensors(base)
            await self._bring(self.transport, [target], tensors, brought, bucket_bytes, deadline)
        elif not await self._publish_again(target, brought, bucket_bytes, deadline):
            return
        if lora is not None:
            await self._lay_over([target], lora, {name: base}, ends)

    async def _publish_again(
        self, target: PublishTarget, brought: Attested | Based, bucket_bytes: int, deadline: float
    ) -> bool:
        """Brings the engine the last whole version from the trainer. False where the trainer does not hold it."""
        held, name, version = self._held, target.engine.name, brought.version
        if self.transport is None or held is None or held.version != version:
            logger.warning(
                "%s serves after the next publish: version %d is in no store (publish.folder), and the trainer was "
                "given no function to publish it again",
                name,
                version,
            )
            return False
        try:
            tensors = await asyncio.to_thread(self._as_checkpoint, held.tensors(), [target], require_finite=False)
            await self._bring(self.transport, [target], tensors, brought, bucket_bytes, deadline, held.fingerprint)
        except WeightsChanged as error:
            logger.warning("%s serves after the next publish: version %d is gone: %s", name, version, error)
            return False
        except MillraceError:
            raise
        except Exception:  # the trainer's function may raise anything, and has no caller who would see it
            logger.exception("%s serves after the next publish: the trainer did not give version %d", name, version)
            return False
        logger.warning("version %d was published again, to %s", version, name)
        return True

    def let_go(self) -> None:
        """Forgets the trainer's function: from now on the trainer changes its weights."""
        self._held = None

    async def restore(self, targets: Sequence[PublishTarget], bucket_bytes: int, deadline: float) -> None:
        """Has these engines, whose weights slept, read anew what they were started with. Who does not is out of
        rotation, until it has been started anew."""
        origin = self._origin
        assert origin is not None
        own = FolderTransport(origin.folder, origin.checksums)
        async with self._alone():
            try:
                tensors = FolderTensors(origin.folder)
                report = await self._bring(own, targets, tensors, Based(origin.version), bucket_bytes, deadline)
            except PublishError as error:
                logger.error("%s", error)
                for target in targets:
                    await self._apply(target.engine.name, Quarantined(str(error)))
                return
            sound = [target.engine for target in targets if target.engine.name not in report.failed]
            await asyncio.gather(*(self._confirm(engine, Attested(origin.version)) for engine in sound))

    async def _confirm(self, engine: Engine, then: Event) -> None:
        """Takes an engine into rotation that has read its folder again. One that names its tensors in its own layout
        alone must hold what it held after its start."""
        try:
            first = self._first_held.get(engine.name)
            if first is not None and await engine.checksums() != first:
                raise EngineFailed(engine.name, "it holds other weights than after its start")
        except EngineError as error:
            logger.error("out of rotation: %s", error)
            then = verdict(error)
        await self._apply(engine.name, then)

    async def compare(self, replica: Replica, origin: Origin, then: Event) -> None:
        """Takes an engine into rotation that holds these tensors: for weights that it loaded by itself. Raises
        EngineFailed for one that holds others."""
        engine = replica.engine
        if Capability.CHECKSUMS not in replica.info.capabilities:
            if replica.process is not None and Path(replica.info.model_path) == origin.folder:
                if self.frozen and Capability.OWN_CHECKSUMS in replica.info.capabilities:
                    self._first_held[engine.name] = await engine.checksums()
                await self._apply(engine.name, then)
            return
        held = await engine.checksums()
        known = held.keys() & origin.checksums.keys()
        if wrong := sorted(name for name in known if held[name] != origin.checksums[name]):
            raise EngineFailed(engine.name, f"it holds other weights than the model's folder: {', '.join(wrong[:3])}")
        if unknown := sorted(held.keys() - known):
            logger.warning("%s: not compared, the folder has no %s", engine.name, ", ".join(unknown[:3]))
        await self._apply(engine.name, then)

    async def _bring(
        self,
        transport: Transport,
        targets: Sequence[PublishTarget],
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        brought: Attested | Based,
        bucket_bytes: int,
        deadline: float,
        fingerprint: Fingerprint | None = None,
    ) -> PublishReport:
        """Publish to these engines. Those that take the version become `brought`, and the others leave rotation."""
        version = brought.version

        async def on_outcome(name: str, outcome: Outcome, error: EngineError | None) -> None:
            match outcome:
                case Outcome.COMMITTED:
                    if isinstance(brought, Attested):
                        self._last = self._base = version
                        self.loras.current = None
                    self.loras.retire(name, keep=None, at_once=True)
                    await self._apply(name, brought)
                case Outcome.EMPTY:
                    await self._apply(name, WeightsLost())
                case Outcome.UNTRUSTED:
                    await self._apply(name, Quarantined(str(error)))

        publish = Publish(
            targets,
            tensors,
            version,
            transport,
            bucket_bytes=bucket_bytes,
            deadline=deadline,
            on_outcome=on_outcome,
            fingerprint=fingerprint,
        )
        report = await publish.run()
        for name, error in report.failed.items():
            logger.error("version %d: %s is out of rotation: %s", version, name, error)
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

    def _as_checkpoint(self, given: Tensors, engines: Sequence[PublishTarget], require_finite: bool) -> Tensors:
        """The tensors by the checkpoint's names and in the engines' dtypes. Raises PublishError where the trainer's are
        not the model's, or not finite."""
        from millrace.weights.finite import only_finite  # imports torch
        from millrace.weights.trained import read_trained

        try:
            if self._trained is None:
                self._trained = read_trained(self._model_folder(engines))
            dtypes = self._dtypes_of(engines)
            tensors = self._trained.tensors(given)
            return cast(only_finite(given, tensors, dtypes) if require_finite else tensors, dtypes)
        except DataError as error:
            raise PublishError(str(error)) from error

    def _dtypes_of(self, engines: Sequence[PublishTarget]) -> Dtypes:
        if self._origin is not None:
            return self._origin.dtypes
        return dtypes_of(engines[0].info, self._model_folder(engines))

    def _model_folder(self, engines: Sequence[PublishTarget]) -> Path:
        """It need not be on this host."""
        return self._origin.folder if self._origin is not None else Path(engines[0].info.model_path)

    def _checked(
        self,
        given: "Iterable[tuple[str, torch.Tensor]]",
        config: LoraConfig,
        engines: Sequence[PublishTarget],
        require_finite: bool,
    ) -> "dict[str, torch.Tensor]":
        """The adapter's tensors. Raises PublishError where they can't be laid over the engines' weights."""
        if lacking := [target.engine.name for target in engines if not target.can(Capability.LORA)]:
            raise PublishError(
                f"{', '.join(lacking)} can't take adapters; SGLang and vLLM need engine_args: {{enable_lora: true}}"
            )
        named = list(given)
        tensors = dict(named)
        if len(tensors) < len(named):
            raise PublishError("the trainer named a tensor twice")
        folder = self._model_folder(engines)
        known = stored_tensors(folder) if has_weights(folder) else None
        base = {name: tensor.shape for name, tensor in known.items()} if known is not None else None
        check_lora({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, base)
        check_values(tensors)
        if require_finite:
            from millrace.weights.finite import only_finite  # imports torch

            only_finite(tensors, tensors.items(), self._dtypes_of(engines))
        return tensors

    async def _lay_over(
        self,
        targets: Sequence[PublishTarget],
        lora: WrittenLora,
        bases: Mapping[str, int | None],
        ends: float,
    ) -> list[EngineReport]:
        """Loads the adapter into these engines, over the whole versions that they hold. Those that have it are routable
        then; those that have not are out of rotation, unless it is all of them: then PublishError is raised, and they
        are as they were."""
        reports: dict[str, EngineReport] = {}

        async def one(target: PublishTarget) -> None:
            name = target.engine.name
            try:
                if bases[name] is None or bases[name] != self._base:
                    raise EngineRefused(name, "it holds no whole version that the adapter is for; publish one first")
                legs = await self.loras.load(target, lora, ends)
            except EngineError as error:
                reports[name] = EngineReport(name, error, False, 0.0, 0.0, 0.0, 0.0, 0.0)
                return
            reports[name] = EngineReport(name, None, False, legs.room, legs.load, legs.attest, 0.0, 0.0)
            self._last, self.loras.current = lora.version, lora
            await self._apply(name, Attested(lora.version, lora.name))
            self.loras.retire(name, keep=lora.name)

        async with asyncio.TaskGroup() as group:
            for target in targets:
                group.create_task(one(target))
        failed = {name: report.error for name, report in reports.items() if report.error is not None}
        if len(failed) == len(targets):
            reasons = "; ".join(map(str, failed.values()))
            raise PublishError(f"no engine took the adapter of version {lora.version}: {reasons}")
        for name, error in failed.items():
            logger.error("version %d: %s is out of rotation: %s", lora.version, name, error)
            base = bases[name]
            if not isinstance(error, EngineRefused | LocalError):
                await self._apply(name, Quarantined(str(error)))
            elif base is not None:
                await self._apply(name, Based(base))
                self.loras.retire(name, keep=None)
        return [reports[target.engine.name] for target in targets]

    def _require_transport(self) -> Transport:
        """What brings whole versions. Raises PublishError where nothing does, and ConfigError without torch."""
        if self.transport is None:
            with needs_extra("publishing weights"):
                import torch  # noqa: F401
            raise PublishError(
                "there is no way to hand tensors from this process to all of the engines; with dp_size above 1, and a "
                "vLLM that was started without Millrace's extension, they take weights from disk only: set "
                "publish.folder to a path that they and the trainer share; an SGLang that quantises takes them only "
                "with load_format flash_rl"
            )
        return self.transport

    def _require_next(self, version: int) -> None:
        """Raises PublishError where the version can't be published now."""
        if self.frozen:
            raise PublishError("this fleet's model is frozen, as a judge's is: nothing is published to it")
        if self._publishing:
            raise PublishError(f"version {version} can't be published while another version is on its way")
        if self._last is not None and version <= self._last:
            raise PublishError(f"version {version} is not newer than version {self._last}, which was published before")
