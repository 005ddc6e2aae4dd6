"""Publishes the trainer's versions: numbers and labels each, sends it to every usable engine, and stores it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from millrace.errors import EnginesLost, NoEngineError, PublishError
from millrace.fleet.kept import KeptEngines
from millrace.fleet.labels import Label
from millrace.fleet.replica_state import Attested
from millrace.fleet.replicas import OwnedReplicaSet
from millrace.fleet.republish import Republishable
from millrace.fleet.versions import Versions, target_of
from millrace.imports import needs_extra
from millrace.types import LoraConfig, MemoryTag
from millrace.weights.audit import samples_for
from millrace.weights.report import PublishReport
from millrace.weights.source import WeightSource
from millrace.weights.transports.base import PublishTarget, Transport

Context = Callable[[], AbstractContextManager[None]]

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes to the engines of a fleet, one version at a time.

    kept: records that engines are being updated. wanting: returns a context that is open while a publish waits for an
    engine. interrupting: returns one that is open while a publish interrupts requests.
    """

    def __init__(
        self,
        replicas: OwnedReplicaSet,
        versions: Versions,
        kept: KeptEngines | None,
        wanting: Context,
        interrupting: Context,
    ) -> None:
        self._replicas, self._versions, self._kept = replicas, versions, kept
        self._wanting, self._interrupting = wanting, interrupting

    async def whole(
        self,
        source: WeightSource,
        version: int | None,
        label: Label | None,
        *,
        bucket_bytes: int,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """See `Fleet.publish`."""

        async def send(number: int) -> PublishReport:
            return await self._send_whole(source, number, bucket_bytes, deadline, require_finite=require_finite)

        while True:
            await self._an_engine(deadline)
            try:
                with self._interrupting():
                    return await self._publish(version, label, send)
            except EnginesLost as error:
                for lost in error.errors:  # they are restarted only after their failure is recorded
                    await self._replicas.suspect(lost.engine, lost)
                if source.once or not self._replicas.coming:
                    raise
                logger.warning("%s; the version is published again when an engine is back", error)

    async def lora(
        self,
        source: WeightSource,
        version: int | None,
        label: Label | None,
        *,
        config: LoraConfig,
        deadline: float,
        require_finite: bool,
    ) -> PublishReport:
        """See `Fleet.publish_lora`."""

        async def send(number: int) -> PublishReport:
            return await self._send_lora(source, number, config, deadline, require_finite=require_finite)

        await self._an_engine(deadline)
        return await self._publish(version, label, send, lora=True)

    async def _an_engine(self, deadline: float) -> None:
        """Wait for an engine to publish to. Raises NoEngineError if none comes."""
        if not self._replicas.snapshot.usable:
            with self._wanting():
                await self._replicas.recovered()
                await self._replicas.until(lambda: bool(self._replicas.snapshot.usable), deadline)

    async def _publish(
        self,
        version: int | None,
        label: Label | None,
        send: Callable[[int], Awaitable[PublishReport]],
        *,
        lora: bool = False,
    ) -> PublishReport:
        """Publish one version by `send`. It has its label before an engine serves it."""
        replicas, versions = self._replicas, self._versions
        version = versions.next if version is None else version
        left_out = tuple(state.describe() for state in replicas.snapshot.replicas if not state.usable)
        with replicas.event_log.publishing(version, label, lora=lora) as publishing:
            self._require_next(version)
            replicas.labels.put(version, label)
            if self._kept is not None:
                self._kept.publishing(version)
            try:
                report = publishing.report = replace(await send(version), label=label, left_out=left_out)
            finally:
                if versions.last != version:
                    replicas.labels.put(version, None)
                if self._kept is not None:
                    self._kept.published(replicas.snapshot.replicas, replicas.labels)
        return report

    async def _send_whole(
        self, given: WeightSource, version: int, bucket_bytes: int, deadline: float, *, require_finite: bool
    ) -> PublishReport:
        versions = self._versions
        source, transport = given.opened(), self._require_transport()
        versions.storing.require_twice(source)
        engines = self._targets()
        async with versions.alone():
            unstored = await versions.storing.ready(deadline)
            samples = samples_for(version, {target.engine.name: target.info for target in engines})
            source = await asyncio.to_thread(
                versions.checkpoint.whole, source, engines, require_finite=require_finite, samples=samples
            )
            again = Republishable(given, version) if given.function is not None else None
            fingerprint = again.fingerprint if again is not None else None
            report = await versions.bring(
                transport, engines, source, Attested(version), bucket_bytes, deadline, fingerprint, samples
            )
            versions.again = again
            unstored = await versions.storing.keep(version, source, bucket_bytes) or unstored
        return replace(report, unstored=unstored)

    async def _send_lora(
        self, source: WeightSource, version: int, config: LoraConfig, deadline: float, *, require_finite: bool
    ) -> PublishReport:
        versions, engines, started = self._versions, self._targets(), time.monotonic()
        async with versions.alone():
            named = await asyncio.to_thread(
                versions.checkpoint.lora, source, engines, config=config, require_finite=require_finite
            )
            async with versions.loras.written(engines, version, named, config) as lora:
                staged = time.monotonic() - started
                bases = {state.name: state.base for state in self._replicas.snapshot.replicas}
                reports = await versions.loras.lay_over(engines, lora, versions.base, bases, started + deadline)
        return PublishReport(version, lora.nbytes, time.monotonic() - started, staged, tuple(reports))

    def _targets(self) -> Sequence[PublishTarget]:
        """Return the engines to publish to. Raises PublishError if weights sleep, and NoEngineError if none is left."""
        snapshot = self._replicas.snapshot
        states = [state for state in snapshot.replicas if state.usable]
        if asleep := [state.name for state in states if MemoryTag.WEIGHTS in state.asleep]:
            raise PublishError(f"the weights of {', '.join(asleep)} are asleep; wake them before publishing")
        if not states:
            raise NoEngineError(f"no engine is left to publish to: {snapshot.describe()}")
        return [target_of(self._replicas.by_name[state.name]) for state in states]

    def _require_next(self, version: int) -> None:
        """Raises PublishError if the version can't be published now."""
        versions = self._versions
        if versions.frozen:
            raise PublishError("this fleet is frozen, as a judge's is: nothing can be published to it")
        if versions.publishing:
            raise PublishError(f"version {version} can't be published while another version is being published")
        if versions.last is not None and version <= versions.last:
            raise PublishError(
                f"version {version} is not newer than version {versions.last}, which was published before"
            )

    def _require_transport(self) -> Transport:
        """Return the transport. Raises PublishError if there is none, and ConfigError if torch is not installed."""
        if self._versions.transport is None:
            with needs_extra("publishing weights"):
                import torch  # noqa: F401
            raise PublishError(
                "no transport reaches all of the engines from this process; an SGLang with dp_size above 1 and without "
                "enable_dp_attention, and a vLLM that was started without Millrace's extension, or with dp_size above "
                "1 and without Millrace's middleware, take weights only from disk: set publish.folder to a path that "
                "they and the trainer share; an SGLang that quantises takes weights only with load_format "
                "flash_rl"
            )
        return self._versions.transport
