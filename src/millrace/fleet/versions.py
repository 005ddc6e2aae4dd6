"""The weight versions of a fleet: what was published, and how a version reaches the engines, also a late one."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
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
from millrace.types import Capability, EngineInfo
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
    their start. `changing`: a lock, held while the weights or memory of engines change. `publishing`: whether a version
    is being published. `base`: the last whole version. `again`: how the trainer provides it again; None once its
    weights may have changed.
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
        self.changing = asyncio.Lock()
        self.storing = Storing(store)
        self.publishing = False
        self.checkpoint = Checkpoint()
        self.base: int | None = None
        self._newest_before = 0  # the newest version that an earlier owner of these engines published, as far as known
        self._record: tuple[int, Mapping[str, str]] | None = None  # a published version's checksums, by tensor
        self.again: Republishable | None = None
        self.loras = PublishedLoras(store.folder if store is not None else None, apply)

    @property
    def _origin(self) -> Origin | None:
        """The weights with which the engines start; None if they are not known."""
        return self.checkpoint.origin

    async def close(self) -> None:
        """Wait for the background work, and close the transport and the store."""
        await self.loras.close()
        if self.transport is not None:
            await self.transport.close()
        await self.storing.close()

    @property
    def published(self) -> bool:
        """Whether a whole version was published, besides the weights with which the engines start."""
        return self.base is not None and (self._origin is None or self.base != self._origin.version)

    @property
    def last(self) -> int | None:
        """The last version, whole or an adapter."""
        return self.loras.current.version if self.loras.current is not None else self.base

    @property
    def recoverable(self) -> bool:
        """Whether an engine that starts gets the last version although no other engine has it: it is stored, or in the
        model's folder. The trainer's weights may have changed."""
        own = self._origin is not None and self.base == self._origin.version
        return own or (self.transport is not None and self.base in self.stored)

    @property
    def stored(self) -> Sequence[int]:
        """The stored versions."""
        return self.store.versions if self.store is not None else ()

    @property
    def dtypes(self) -> Dtypes | None:
        """The engines' dtypes, by tensor."""
        return self._origin.dtypes if self._origin is not None else None

    @property
    def next(self) -> int:
        """The number that the next version gets: above the last one, and above those of an earlier owner."""
        return max(self._newest_before, self.last or 0) + 1

    def begin_with(self, origin: Origin, infos: Iterable[EngineInfo]) -> None:
        """Set the weights with which the engines start. `infos`: what the engines report."""
        self.checkpoint.origin, self.base = origin, origin.version
        reported = [info.weight_version for info in infos if info.weight_version is not None]
        self._newest_before = max([*reported, *self.stored], default=0)

    async def recognize(self, replica: Replica, origin: Origin) -> None:
        """Take an engine into rotation that holds a known version when the fleet begins (`Origin.version_of`)."""
        version = await origin.version_of(replica, self.store, remember=self.frozen)
        if version is not None:
            self.base = max(version, self.base or 0)
            await self._apply(replica.engine.name, Attested(version))

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Return a context in which no other version is published, and no engine catches up."""
        self.publishing = True
        try:
            async with self.changing:
                yield
        finally:
            self.publishing = False

    async def catch_up(
        self, started: Replica, peers: Callable[[int], Sequence[Replica]], bucket_bytes: int, deadline: float
    ) -> None:
        """Bring an engine what the others serve: the last whole version, and the adapter over it.

        peers: returns the engines that serve a whole version. The caller holds the lock `changing`.
        """
        ends = time.monotonic() + deadline
        await self.storing.secured(deadline)
        name, base, lora = started.engine.name, self.base, self.loras.current
        assert base is not None or lora is None
        if base is None:
            return
        brought = Attested(base) if lora is None else Based(base)
        target = target_of(started)
        if self._origin is not None and base == self._origin.version:
            try:
                if await self._origin.holds(started, remember=self.frozen):
                    await self._apply(name, brought)
            except EngineError as error:
                await self._apply(name, verdict(error))
                raise
        elif await self._bring_from_peer(target, peers(base), brought, deadline):
            pass
        elif self.transport is not None and self.store is not None and base in self.store.versions:
            source = source_of(self.store.tensors(base))
            await self.bring(self.transport, [target], source, brought, bucket_bytes, deadline)
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
            await self.bring(way, [target], source_of(()), brought, 0, deadline * PEER_SHARE)
        except (EngineError, PublishError) as error:
            logger.warning("%s does not get version %d from %s: %s", name, brought.version, peer.name, error)
            return False
        logger.info("%s got version %d from %s", name, brought.version, peer.name)
        return True

    async def _publish_again(
        self, target: PublishTarget, brought: Attested | Based, bucket_bytes: int, deadline: float
    ) -> bool:
        """Bring an engine the last whole version from the trainer. Return False if the trainer can't provide it."""
        again, name, version = self.again, target.engine.name, brought.version
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
                self.checkpoint.whole, source, [target], require_finite=False, samples=samples
            )
            await self.bring(transport, [target], source, brought, bucket_bytes, deadline, fingerprint, samples)

        return await again.publish(name, bring)

    async def restore(self, replicas: Sequence[Replica], bucket_bytes: int, deadline: float) -> None:
        """Make these engines, whose weights slept, read the weights of their start again.

        An engine that fails to do so leaves rotation until it is restarted.
        """
        origin = self._origin
        assert origin is not None
        targets = [target_of(replica) for replica in replicas]
        own = FolderTransport(origin.folder, origin.checksums)
        async with self.alone():
            try:
                source = source_of(FolderTensors(origin.folder))
                report = await self.bring(own, targets, source, Based(origin.version), bucket_bytes, deadline)
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

    async def bring(
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
                        self.base = version
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


def target_of(replica: Replica) -> PublishTarget:
    """Return an engine as a publish needs it."""
    return PublishTarget(replica.engine, replica.info)
