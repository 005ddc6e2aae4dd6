"""The replicas of one model as one: it routes requests, publishes versions, sleeps and wakes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from millrace import arguments
from millrace.engines.start import Replica
from millrace.errors import ArgumentError, EnginesLost, NoEngineError, PublishError
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.kv_feed import KVEventFeeds
from millrace.fleet.lifecycle import BUCKET_BYTES, CATCH_UP_DEADLINE, Lifecycle
from millrace.fleet.replica_state import Attested, Phase, ReplicaState, Slept, Woke
from millrace.fleet.replicas import OwnedReplicaSet, ReplicaSet
from millrace.fleet.republish import Tensors
from millrace.fleet.versions import Origin, Versions
from millrace.types import (
    ALL_MEMORY,
    Capability,
    GenerateRequest,
    Generation,
    LoraConfig,
    MemoryTag,
    RoutingContext,
)
from millrace.weights.cast import Dtypes, dtypes_of, folder_checksums_as
from millrace.weights.report import PublishReport
from millrace.weights.transports.base import PublishTarget, Transport

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore


class Fleet(FleetClient):
    """Made by `Fleet.open`, which also ends what it started. `snapshot` is the truth about the members."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        transport: Transport | None,
        store: "VersionStore | None" = None,
        start: Callable[[int], Awaitable[Replica]] | None = None,
        restarts: int = 0,
        event_log: EventLog | None = None,
        seed: int = 0,
        *,
        frozen: bool = False,
    ) -> None:
        event_log = event_log if event_log is not None else EventLog()
        self._replicas = OwnedReplicaSet(replicas, event_log, _Observer(self))
        super().__init__(self._replicas, event_log, seed)
        self._feeds = KVEventFeeds(self._router)
        self._versions = Versions(transport, store, self._replicas.apply, frozen=frozen)
        self.external_router: ExternalRouter | None = None
        self._lifecycle = Lifecycle(self._replicas, self._versions, start, restarts)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        replicas: Sequence[Replica],
        transport: Transport | None,
        store: "VersionStore | None" = None,
        start: Callable[[int], Awaitable[Replica]] | None = None,
        restarts: int = 0,
        event_log: EventLog | None = None,
        seed: int = 0,
        *,
        frozen: bool = False,
        router: "Callable[[ReplicaSet, EventLog], AbstractAsyncContextManager[ExternalRouter]] | None" = None,
    ) -> "AsyncIterator[Fleet]":
        """Watches the replicas' processes as long as the block runs, and in the end closes the transport, the store,
        the engines' connections and the processes. `store` keeps what is published; `start` starts the replica of that
        number anew, which happens by itself so many times in a row (`restarts`); `seed` draws the order in which equal
        engines are chosen. A `frozen` fleet is never published to. `router` opens one of others' that stands before the
        engines."""
        fleet = cls(replicas, transport, store, start, restarts, event_log, seed, frozen=frozen)
        fleet._lifecycle.begin()
        try:
            if router is None:
                yield fleet
                return
            async with router(fleet._replicas, fleet.event_log) as fleet.external_router:
                yield fleet
        finally:
            fleet._replicas.closed = True
            await fleet._lifecycle.close()
            fleet._feeds.close()
            await fleet._versions.close()
            await asyncio.gather(*(replica.end() for replica in fleet._replicas.replicas.values()))

    async def publish(
        self,
        tensors: "Tensors | Callable[[], Tensors]",
        version: int,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        deadline: float = 120.0,
        require_finite: bool = True,
    ) -> PublishReport:
        """Brings a version into every usable engine; one that does not take it is quarantined and named in the report.

        `tensors` is consumed lazily and in a thread. Its values are checked before, unless it is an iterator, which is
        checked on the way. With `require_finite=False` they are not checked.

        Raises PublishError when a value is NaN or infinite, when no engine takes the version, when another publish is
        under way, or when `version` is not above the last one. Whatever is raised, the old version goes on serving
        where it was, unless the engine's update had begun and can't be undone (SGLang, vLLM): such an engine serves
        again after the next publish.

        Where versions are kept, `tensors` is gone through once more when the engines serve, and can't be an iterator.
        The version becomes safe in the background; the next publish waits for that.

        `tensors` may be a function that returns them, such as `lambda: list(model.named_parameters())`. The fleet then
        calls it again, in any thread, when an engine needs this version and no store has it: an engine that was started
        again, or added. It does so until the next publish, or until the weights sleep. What comes is compared with
        what was published, by sampled checksums; where the trainer has changed it meanwhile, or the function raises
        WeightsChanged, the engine serves after the next publish.

        While every engine is being started again, the publish waits for that, however long the start takes. Where all
        of them die during the publish, it begins again when one is back (unless `tensors` is an iterator). `deadline`,
        in seconds, is for the engines to take the version.
        """
        self._require_open(deadline)
        version = _version(version)
        while True:
            await self._replicas.recovered()
            await self._replicas.until(lambda: self.snapshot.usable, deadline)
            left_out = self._left_out()
            try:
                with self._interrupting(), self.event_log.publishing(version) as publishing:
                    report = publishing.report = await self._versions.publish_whole(
                        tensors,
                        version,
                        self._targets,
                        bucket_bytes=bucket_bytes,
                        deadline=deadline,
                        require_finite=require_finite,
                    )
                return replace(report, left_out=left_out)
            except EnginesLost as error:
                for lost in error.errors:  # until this is known, none of them is being started again
                    await self._replicas.suspect(lost.engine, lost)
                if isinstance(tensors, Iterator) or not self.members.coming:
                    raise
                logger.warning("%s; it is published again when an engine is back", error)

    async def publish_lora(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        *,
        config: LoraConfig,
        deadline: float = 60.0,
        require_finite: bool = True,
    ) -> PublishReport:
        """Brings a LoRA adapter over the last whole version into every usable engine, while these go on generating.

        `tensors` are named as PEFT does, `base_model.model.MODULE.lora_A.weight` and `lora_B`. Requests that begin when
        an engine has it use it, and their version spans say `version`. Running requests end with the weights that they
        began with. At most two adapters are loaded in an engine. If requests still run with the one before the last,
        the publish waits for them for half of `deadline`, and then aborts them.

        An engine that does not take the adapter is out of rotation and named in the report; where it only said no, it
        serves again after the next one. PublishError is raised, and what served before goes on serving, when the
        tensors are not those of such an adapter of the model, when no engine takes it or none can read it, and as
        `publish` says. A version that is published whole takes the adapter off.
        """
        self._require_open(deadline)
        version = _version(version)
        if not isinstance(config, LoraConfig):
            raise ArgumentError(f"config must be a LoraConfig, and is {arguments.shown(config)}")
        left_out = self._left_out()
        with self.event_log.publishing(version, lora=True) as publishing:
            report = publishing.report = await self._versions.publish_lora(
                tensors,
                version,
                self._targets,
                lambda: {member.name: member.base for member in self.snapshot.members},
                config=config,
                deadline=deadline,
                require_finite=require_finite,
            )
        return replace(report, left_out=left_out)

    def _left_out(self) -> tuple[str, ...]:
        return tuple(member.describe() for member in self.snapshot.members if not member.usable)

    def _targets(self) -> list[PublishTarget]:
        """Whom to publish to. Raises PublishError and NoEngineError where nobody can take a version."""
        members = [m for m in self.snapshot.members if m.usable]
        if asleep := [m.name for m in members if MemoryTag.WEIGHTS in m.asleep]:
            raise PublishError(f"the weights of {', '.join(asleep)} are asleep; wake them before publishing")
        if not members:
            raise NoEngineError(f"no engine is left to publish to: {self.snapshot.describe()}")
        replicas = [self._replicas.replicas[member.name] for member in members]
        return [PublishTarget(replica.engine, replica.info) for replica in replicas]

    async def restart(
        self, name: str, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE
    ) -> None:
        """Ends this engine, starts it anew, and brings it what the others serve, within `deadline` seconds, before its
        first request: from the store, or from the trainer where `publish` was given a function. Otherwise it serves
        after the next publish. Raises LaunchError where it does not come up, PublishError where it does not take the
        version, and NoEngineError where the fleet does not start its engines."""
        self._require_open(deadline)
        await self._lifecycle.restart(name, bucket_bytes, deadline)

    async def add(self, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> str:
        """Starts one more engine like the others, and brings it what these serve before its first request, as `restart`
        does. Returns its name."""
        self._require_open(deadline)
        return await self._lifecycle.add(bucket_bytes, deadline)

    async def remove(self, name: str, *, deadline: float = 60.0) -> None:
        """Takes an engine out: it gets no more requests, ends those that it has, for which it gets `deadline` seconds
        before they are aborted, and its process is ended."""
        self._require_open(deadline)
        await self._lifecycle.remove(name, deadline)

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY, *, interrupt: bool = False) -> None:
        """Puts every usable engine to sleep, after what runs there has ended, or with `interrupt` has been aborted. One
        that can't is quarantined.

        The weights of a frozen fleet sleep only where all of its engines can read them anew (`restore`); otherwise
        PublishError is raised."""
        self._require_open()
        if self.frozen and MemoryTag.WEIGHTS in what:
            self._require_own_folder()
        self._replicas.asleep |= what
        if MemoryTag.WEIGHTS in what:
            self._versions.let_go()
        # Out of rotation first: a request that came between the drain and the release would fail.
        for member in self.snapshot.members:
            await self._replicas.apply(member.name, Slept(what))
        async with self._versions.changing:
            if interrupt:
                await self._replicas.each(lambda replica: replica.engine.abort())
            await self._replicas.each(lambda replica: replica.engine.sleep(what))

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Wakes every usable engine. One whose weights slept serves again after the next publish."""
        self._require_open()
        async with self._versions.changing:
            await self._replicas.each(lambda replica: replica.engine.wake(what))
            self._replicas.asleep -= what
        await self._replicas.notify()
        for member in self.snapshot.members:
            await self._replicas.apply(member.name, Woke(what))

    @property
    def dtypes(self) -> Dtypes | None:
        """The dtypes of the engines' weights. Published tensors are cast to them. None before `attest`. `leading`
        (`millrace.weights.sharded`) takes them, to gather fewer bytes."""
        return self._versions.dtypes

    @property
    def frozen(self) -> bool:
        """Whether the engines hold for ever what they were started with."""
        return self._versions.frozen

    async def restore(self, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> None:
        """Wakes a frozen fleet. Weights that slept have lost their content: the engines read them anew from the model's
        folder, each of them is attested as after a publish, and then they get their KV cache back. One that does not
        take them within `deadline` seconds is started anew."""
        self._require_open(deadline)
        if not self.frozen:
            raise PublishError("only a frozen fleet is restored; wake this one, and publish what it is to serve")
        await self.wake(frozenset({MemoryTag.WEIGHTS}))
        empty = [m.name for m in self.snapshot.members if m.usable and m.version is None]
        if empty:
            replicas = [self._replicas.replicas[name] for name in empty]
            targets = [PublishTarget(replica.engine, replica.info) for replica in replicas]
            await self._versions.restore(targets, bucket_bytes, deadline)
        await self.wake(frozenset({MemoryTag.KV_CACHE}))

    def _require_own_folder(self) -> None:
        replicas = self._replicas.replicas.values()
        if lacking := [r.engine.name for r in replicas if Capability.UPDATE_FROM_DISK not in r.info.capabilities]:
            raise PublishError(
                f"{', '.join(lacking)} can't read weights anew from a folder (a quantising SGLang can't), so that they "
                "would be lost in sleep; give it devices of its own"
            )

    async def attest(self, checksums: Mapping[str, str], version: int, folder: Path) -> None:
        """Takes the engines into rotation that hold these tensors: for weights that they loaded by themselves from
        `folder`. A tensor that the engine makes while loading (fused, tied) has no counterpart and is not compared; the
        log names it. An engine that has no checksums to compare is taken at its word, if it was started here and names
        this folder. `checksums` are the folder's; they are compared as they are in the engines' dtype."""
        infos = [replica.info for replica in self._replicas.replicas.values()]
        dtypes = await asyncio.to_thread(dtypes_of, infos[0], folder)
        if any(Capability.CHECKSUMS in info.capabilities for info in infos):
            checksums = await asyncio.to_thread(folder_checksums_as, dtypes, folder, checksums)
        origin = Origin(checksums, version, folder, dtypes)
        await self._replicas.each(lambda replica: self._versions.compare(replica, origin, Attested(version)))
        self._versions.begin_with(origin)

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        self._require_published()
        if self.external_router is None:
            return await self._straight(request, routing, deadline)
        return await self.external_router.generate(request, routing, deadline=deadline, direct=self._straight)

    def _require_published(self) -> None:
        """Raises NoEngineError where all engines are up and awake, and wait for the first publish."""
        waits = self.members.coming or self.asleep or self._versions.published or self._versions.publishing
        if not waits and all(m.version is None and m.phase is Phase.STARTING for m in self.snapshot.members):
            raise NoEngineError(
                "no engine serves before the first publish, since their weights were not compared with the model's "
                f"folder: publish a version, or open the fleet with frozen=True; {self.snapshot.describe()}"
            )

    def _interrupting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.external_router is None else self.external_router.publishing()

    def _using(self, engine: str, lora: str | None, request_id: str) -> AbstractContextManager[None]:
        return self._versions.loras.using(engine, lora, request_id)


class _Observer:
    """What a fleet does when one of its replicas changes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def replica_changed(self, before: ReplicaState, after: ReplicaState) -> None:
        if not after.routable or after.version != before.version:
            self._fleet._router.forget(after.name)
        self._fleet._lifecycle.changed(after)

    def watching(self, replica: Replica) -> AbstractAsyncContextManager[None]:
        return self._fleet._feeds.listening(replica.engine.name, replica.kv_events)

    def is_idle(self, name: str) -> bool:
        router = self._fleet.external_router
        return not (self._fleet._outstanding[name] or (router is not None and router.uses(name)))


def _version(version: object) -> int:
    """A version as Python's integer. Raises PublishError for what is none."""
    try:
        return arguments.whole("version", version)
    except ArgumentError:
        raise PublishError(f"a version is a number, and {version!r} is not") from None
