"""The weight versions of a fleet: publishes one at a time, stores it if configured, and updates late engines."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.engines.start import Replica
from millrace.errors import EngineError, EngineFailed, PublishError
from millrace.fleet.checkpoint import Checkpoint
from millrace.fleet.lora import PublishedLoras
from millrace.fleet.origin import Origin
from millrace.fleet.replica_state import Attested, Based, Event, Quarantined, WeightsLost, verdict
from millrace.fleet.republish import Republishable
from millrace.fleet.storing import Storing
from millrace.imports import needs_extra
from millrace.types import Capability, LoraConfig
from millrace.weights.audit import Samples, samples_for
from millrace.weights.cast import Dtypes
from millrace.weights.fingerprint import Fingerprint
from millrace.weights.folder import FolderTensors
from millrace.weights.publisher import Outcome, Publish
from millrace.weights.report import PublishReport
from millrace.weights.shards import way_for
from millrace.weights.source import WeightSource, source_of
from millrace.weights.transports.base import PublishTarget, Transport
from millrace.weights.transports.folder import FolderTransport
from millrace.weights.transports.peer import PeerTransport

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore

PEER_SHARE = 0.5  # of the time for an engine to catch up: the rest is for the other ways

logger = logging.getLogger(__name__)


class Versions:
    """The weight versions of one fleet, and how they reach its engines.

    `apply` is called with the event when the weights of an engine change. `frozen`: the engines keep the weights of
    their start.
    """

    def __init__(
        self,
        transport: Transport | None,
        store: "VersionStore | None",
        apply: Callable[[str, Event], Awaitable[None]],
        *,
        frozen: bool = False,
    ) -> None:
        self.transport, self.store, self._apply, self.frozen = transport, store, apply, frozen
        self.changing = asyncio.Lock()  # locked while the weights or memory of engines change
        self.storing = Storing(store)
        self._publishing = False
        self._checkpoint = Checkpoint()
        self._base: int | None = None  # the last whole version
        self._record: tuple[int, Mapping[str, str]] | None = None  # a published version's checksums, by tensor
        self._republishable: Republishable | None = None  # the trainer's current weights
        self.loras = PublishedLoras(store.folder if store is not None else None, apply)

    @property
    def _origin(self) -> Origin | None:
        """The weights with which the engines start; None if they are not known."""
        return self._checkpoint.origin

    async def close(self) -> None:
        """Wait for the background work, and close the transport and the store."""
        await self.loras.close()
        if self.transport is not None:
            await self.transport.close()
        await self.storing.close()

    @property
    def published(self) -> bool:
        """Whether a whole version was published, besides the weights with which the engines start."""
        return self._base is not None and (self._origin is None or self._base != self._origin.version)

    @property
    def last(self) -> int | None:
        """The last version, whole or an adapter."""
        return self.loras.current.version if self.loras.current is not None else self._base

    @property
    def recoverable(self) -> bool:
        """Whether an engine that starts gets the last version although no other engine has it: it is stored, or in the
        model's folder. The trainer's weights may have changed."""
        own = self._origin is not None and self._base == self._origin.version
        return own or (self.transport is not None and self._base in self.stored)

    @property
    def publishing(self) -> bool:
        """Whether a version is being published."""
        return self._publishing

    @property
    def stored(self) -> Sequence[int]:
        """The stored versions."""
        return self.store.versions if self.store is not None else ()

    @property
    def dtypes(self) -> Dtypes | None:
        """The engines' dtypes, by tensor."""
        return self._origin.dtypes if self._origin is not None else None

    def begin_with(self, origin: Origin) -> None:
        """Set the weights with which the engines start."""
        self._checkpoint.origin, self._base = origin, origin.version

    async def recognize(self, replica: Replica, origin: Origin) -> None:
        """Take an engine into rotation that holds the weights of the model's folder.

        An engine that ran before does, too, if it holds the version that its owner's record says, or the last stored
        one. Otherwise it serves after the next publish. Raises EngineFailed if an engine that was started here holds
        other weights.
        """
        name, reported, store = replica.engine.name, replica.info.weight_version, self.store
        if not replica.found:
            await self.compare(replica, origin, Attested(origin.version))
            return
        knows = Capability.CHECKSUMS in replica.info.capabilities
        known = reported is not None and reported == replica.held
        if knows and not known and store is not None and reported is not None:
            known = store.is_last(reported, await replica.engine.checksums())
        if known and reported is not None:
            self._base = max(reported, self._base or 0)
            await self._apply(name, Attested(reported))
            return
        if not knows:
            logger.info("%s serves after the next publish: it can't say which weights it holds", name)
            return
        reason = f"it reports version {reported}, and the model's folder has version {origin.version}"
        if reported in (None, origin.version):
            try:
                await self.compare(replica, origin, Attested(origin.version))
                return
            except EngineFailed as error:
                reason = str(error)
        logger.warning("%s serves after the next publish: %s", name, reason)

    async def publish_whole(
        self,
        given: WeightSource,
        version: int,
        targets: Callable[[], Sequence[PublishTarget]],
        *,
        bucket_bytes: int,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """See `Fleet.publish`. `targets` returns the engines, and raises if there are none."""
        self.require_next(version)
        source = given.opened()
        transport = self._require_transport()
        self.storing.require_twice(source)
        engines = targets()

        async with self._alone():
            unstored = await self.storing.ready(deadline)
            samples = samples_for(version, {target.engine.name: target.info for target in engines})
            source = await asyncio.to_thread(
                self._checkpoint.whole, source, engines, require_finite=require_finite, samples=samples
            )
            again = Republishable(given, version) if given.function is not None else None
            fingerprint = again.fingerprint if again is not None else None
            report = await self._bring(
                transport, engines, source, Attested(version), bucket_bytes, deadline, fingerprint, samples
            )
            self._republishable = again
            unstored = await self.storing.keep(version, source, bucket_bytes) or unstored
        return replace(report, unstored=unstored)

    async def publish_lora(
        self,
        source: WeightSource,
        version: int,
        targets: Callable[[], Sequence[PublishTarget]],
        bases: Callable[[], Mapping[str, int | None]],
        *,
        config: LoraConfig,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """See `Fleet.publish_lora`. `bases` returns the whole version that each engine holds."""
        self.require_next(version)
        engines, started = targets(), time.monotonic()
        async with self._alone():
            named = await asyncio.to_thread(
                self._checkpoint.lora, source, engines, config=config, require_finite=require_finite
            )
            async with self.loras.written(engines, version, named, config) as lora:
                staged = time.monotonic() - started
                reports = await self.loras.lay_over(engines, lora, self._base, bases(), started + deadline)
        return PublishReport(version, lora.nbytes, time.monotonic() - started, staged, tuple(reports))

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Return a context in which no other version is published, and no engine catches up."""
        self._publishing = True
        try:
            async with self.changing:
                yield
        finally:
            self._publishing = False

    async def catch_up(
        self, started: Replica, peers: Callable[[int], Sequence[Replica]], bucket_bytes: int, deadline: float
    ) -> None:
        """Bring an engine what the others serve: the last whole version, and the adapter over it.

        peers: returns the engines that serve a whole version. The caller holds the lock `changing`.
        """
        ends = time.monotonic() + deadline
        await self.storing.secured(deadline)
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
        elif await self._bring_from_peer(target, peers(base), brought, deadline):
            pass
        elif self.transport is not None and self.store is not None and base in self.store.versions:
            source = source_of(self.store.tensors(base))
            await self._bring(self.transport, [target], source, brought, bucket_bytes, deadline)
        elif not await self._publish_again(target, brought, bucket_bytes, deadline):
            return
        if lora is not None:
            await self.loras.lay_over([target], lora, base, {name: base}, ends)

    async def _bring_from_peer(
        self, target: PublishTarget, peers: Sequence[Replica], brought: Attested | Based, deadline: float
    ) -> bool:
        """Bring an engine the last whole version from another engine. Return False if none can give it.

        Its checksums are compared with those that were recorded when the version was published."""
        giving = [one for one in peers if Capability.UPDATE_FROM_PEER in one.info.capabilities]
        known = self._record is not None and self._record[0] == brought.version
        if not giving or not known or not target.can(Capability.UPDATE_FROM_PEER):
            return False
        assert self._record is not None
        name, peer, record = target.engine.name, giving[0].engine, self._record[1]
        try:
            offered = await peer.offer_weights(list(record))
            if offered.version != brought.version:
                raise EngineFailed(peer.name, f"it reports version {offered.version}")
            way = PeerTransport(offered, record)
            await self._bring(way, [target], source_of(()), brought, 0, deadline * PEER_SHARE)
        except (EngineError, PublishError) as error:
            logger.warning("%s does not get version %d from %s: %s", name, brought.version, peer.name, error)
            return False
        logger.info("%s got version %d from %s", name, brought.version, peer.name)
        return True

    async def _publish_again(
        self, target: PublishTarget, brought: Attested | Based, bucket_bytes: int, deadline: float
    ) -> bool:
        """Bring an engine the last whole version from the trainer. Return False if the trainer can't provide it."""
        again, name, version = self._republishable, target.engine.name, brought.version
        if self.transport is None or again is None or again.version != version:
            logger.warning(
                "%s serves after the next publish: version %d is in no store (publish.folder), and was not published "
                "as a function that returns its tensors again",
                name,
                version,
            )
            return False
        transport, fingerprint = self.transport, again.fingerprint

        async def bring(source: WeightSource) -> None:
            samples = samples_for(version, {name: target.info})
            source = await asyncio.to_thread(
                self._checkpoint.whole, source, [target], require_finite=False, samples=samples
            )
            await self._bring(transport, [target], source, brought, bucket_bytes, deadline, fingerprint, samples)

        return await again.publish(name, bring)

    def release(self) -> None:
        """Forget the trainer's function, since the trainer may change its weights from now on."""
        self._republishable = None

    async def restore(self, targets: Sequence[PublishTarget], bucket_bytes: int, deadline: float) -> None:
        """Make these engines, whose weights slept, read the weights of their start again.

        An engine that fails to do so leaves rotation until it is restarted.
        """
        origin = self._origin
        assert origin is not None
        own = FolderTransport(origin.folder, origin.checksums)
        async with self._alone():
            try:
                source = source_of(FolderTensors(origin.folder))
                report = await self._bring(own, targets, source, Based(origin.version), bucket_bytes, deadline)
            except PublishError as error:
                logger.error("%s", error)
                for target in targets:
                    await self._apply(target.engine.name, Quarantined(str(error)))
                return
            sound = [target.engine for target in targets if target.engine.name not in report.failed]
            await asyncio.gather(*(self._confirm(engine, origin) for engine in sound))

    async def _confirm(self, engine: Engine, origin: Origin) -> None:
        """Take an engine that has read its folder again into rotation, unless its weights are others than before."""
        then: Event = Attested(origin.version)
        try:
            await origin.require_unchanged(engine)
        except EngineError as error:
            logger.error("out of rotation: %s", error)
            then = verdict(error)
        await self._apply(engine.name, then)

    async def compare(self, replica: Replica, origin: Origin, then: Event) -> None:
        """Take an engine into rotation that has loaded these weights itself.

        Raises EngineFailed if its checksums differ.
        """
        if await origin.holds(replica, remember=self.frozen):
            await self._apply(replica.engine.name, then)

    async def _bring(
        self,
        transport: Transport,
        targets: Sequence[PublishTarget],
        source: WeightSource,
        brought: Attested | Based,
        bucket_bytes: int,
        deadline: float,
        fingerprint: Fingerprint | None = None,
        samples: Samples | None = None,
    ) -> PublishReport:
        """Publish to these engines. `brought`: the event for those that take the version; the others leave rotation."""
        version = brought.version

        async def on_outcome(name: str, outcome: Outcome, error: EngineError | None) -> None:
            match outcome:
                case Outcome.COMMITTED:
                    if isinstance(brought, Attested):
                        self._base = version
                        self.loras.current = None
                    self.loras.retire(name, keep=None, at_once=True)
                    await self._apply(name, brought)
                case Outcome.EMPTY:
                    await self._apply(name, WeightsLost())
                case Outcome.UNTRUSTED:
                    await self._apply(name, Quarantined(str(error)))

        ends = time.monotonic() + deadline
        if fingerprint is not None or samples is not None:  # they are of whole tensors
            source = replace(source, led=None)
        async with way_for(source, targets, transport, bucket_bytes=bucket_bytes, deadline=deadline) as way:
            publish = Publish(
                targets,
                source,
                version,
                way,
                bucket_bytes=bucket_bytes,
                deadline=max(ends - time.monotonic(), 0.0),
                on_outcome=on_outcome,
                fingerprint=fingerprint,
                samples=samples,
            )
            report = await publish.run()
        if publish.record is not None:
            self._record = version, publish.record
        for name, error in report.failed.items():
            logger.error("version %d: %s is out of rotation: %s", version, name, error)
        for engine in report.engines:
            if engine.audit is not None:
                logger.info("version %d: %s holds %s", version, engine.engine, engine.audit)
        return report

    def _require_transport(self) -> Transport:
        """Return the transport. Raises PublishError if there is none, and ConfigError if torch is not installed."""
        if self.transport is None:
            with needs_extra("publishing weights"):
                import torch  # noqa: F401
            raise PublishError(
                "no transport reaches all of the engines from this process; an SGLang with dp_size above 1 and without "
                "enable_dp_attention, and a vLLM that was started without Millrace's extension, or with dp_size above "
                "1 and without Millrace's middleware, take weights only from disk: set publish.folder to a path that "
                "they and the trainer share; an SGLang that quantises takes weights only with load_format "
                "flash_rl"
            )
        return self.transport

    def require_next(self, version: int) -> None:
        """Raises PublishError if the version can't be published now."""
        if self.frozen:
            raise PublishError("this fleet is frozen, as a judge's is: nothing can be published to it")
        if self._publishing:
            raise PublishError(f"version {version} can't be published while another version is being published")
        if self.last is not None and version <= self.last:
            raise PublishError(f"version {version} is not newer than version {self.last}, which was published before")
