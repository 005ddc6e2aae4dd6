"""A fleet of engines that serve one model: routes requests, publishes versions, sleeps and wakes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from millrace import arguments
from millrace.config.engines import ReplicaRange
from millrace.engines.start import Replica
from millrace.errors import NoEngineError
from millrace.fleet import memory
from millrace.fleet.autoscaler import Autoscaler, FleetSize
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.kept import KeptEngines
from millrace.fleet.kv_feed import KVEventFeeds
from millrace.fleet.labels import Label, label_value, version_number
from millrace.fleet.lifecycle import BUCKET_BYTES, CATCH_UP_DEADLINE, Lifecycle
from millrace.fleet.origin import Origin
from millrace.fleet.owner import SharedFleet, serve_followers
from millrace.fleet.publishing import Publisher
from millrace.fleet.replica_state import Phase, ReplicaState
from millrace.fleet.replicas import OwnedReplicaSet, ReplicaSet
from millrace.fleet.versions import Versions
from millrace.types import ALL_MEMORY, GenerateRequest, Generation, LoraConfig, MemoryTag, RoutingContext
from millrace.weights.cast import Dtypes
from millrace.weights.report import PublishReport
from millrace.weights.source import Tensors, source_of, weight_source
from millrace.weights.transports.base import Transport

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore


class Fleet(FleetClient):
    """One fleet of replicas of a model, in the process that owns them.

    Open one with `millrace.open_fleet`, which also starts the engines, or with `Fleet.open` for replicas that are
    started already. All methods belong to one event loop.

    `replicas`: the replicas and their states. `external_router`: the external router in front of them, if there is one.
    """

    replicas: OwnedReplicaSet

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
        kept: KeptEngines | None = None,
    ) -> None:
        event_log = event_log if event_log is not None else EventLog()
        owned = OwnedReplicaSet(replicas, event_log, _Observer(self))
        self._versions = Versions(transport, store, owned.apply, frozen=frozen)
        super().__init__(owned, event_log, seed, self._versions.loras.using)
        self._feeds = KVEventFeeds(self._router)
        self._kept = kept
        for known, label in kept.labels.items() if kept is not None else ():
            self.replicas.labels.put(known, label)
        self.external_router: ExternalRouter | None = None
        self._lifecycle = Lifecycle(self.replicas, self._versions, start, restarts)
        self._autoscaler = Autoscaler(self.replicas, self._admission, self._lifecycle, self._versions, event_log)
        self._publisher = Publisher(self.replicas, self._versions, kept, self._autoscaler.wanting, self._interrupting)

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
        kept: KeptEngines | None = None,
        router: "Callable[[ReplicaSet, EventLog], AbstractAsyncContextManager[ExternalRouter]] | None" = None,
        scale: ReplicaRange | None = None,
    ) -> "AsyncIterator[Fleet]":
        """Open a fleet of these replicas. When the context ends, the replicas, the transport and the store are closed.

        Args:
            replicas: The replicas, started and not yet in rotation.
            transport: How published weights reach the engines. None if nothing can be published.
            store: Keeps the published versions.
            start: Starts the replica with this number. Without it the fleet can't restart or add engines.
            restarts: How often in a row an engine is restarted automatically.
            event_log: The event log, which the caller closes. By default events are only counted.
            seed: Decides between equal engines when requests are routed.
            frozen: Refuse every publish.
            kept: Records the engines, which outlive this process.
            router: Opens an external router in front of the engines.
            scale: Bounds between which the fleet chooses the number of engines by its load.
        """
        fleet = cls(replicas, transport, store, start, restarts, event_log, seed, frozen=frozen, kept=kept)
        fleet._lifecycle.begin()
        fleet._autoscaler.begin(scale)
        try:
            if router is None:
                yield fleet
                return
            async with router(fleet.replicas, fleet.event_log) as fleet.external_router:
                yield fleet
        finally:
            fleet.replicas.closed = True
            await fleet._autoscaler.close()
            await fleet._lifecycle.close()
            await fleet._admission.close()
            fleet._feeds.close()
            await fleet._versions.close()
            await asyncio.gather(*(replica.end() for replica in fleet.replicas.by_name.values()))

    async def publish(
        self,
        tensors: "Tensors | Callable[[], Tensors]",
        version: int | None = None,
        *,
        label: Label | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        deadline: float = 120.0,
        require_finite: bool = True,
    ) -> PublishReport:
        """Publish a version of the weights to every usable engine, and return a report.

        Every engine that took the version serves it when this method returns, unless it sleeps. An engine that did not
        take it leaves rotation, and is named in the report.

        `tensors` is read lazily, in a thread. Its values are checked before anything is sent; those of an iterator are
        checked while they are sent. If versions are stored (`folder` of `open_fleet`), `tensors` is read a second time
        after the publish, and can't be an iterator. The version is made durable in the background, and the next publish
        waits until that is done.

        `tensors` may also be a function that returns them. The fleet calls it again, in any thread, if a restarted or
        added engine needs this version and the store does not have it. It drops the function at the next publish, and
        when the weights sleep. Sampled checksums compare the tensors with the published ones. If they differ, or the
        function raises WeightsChanged, the engine serves after the next publish.

        While every engine is being restarted, this method waits, however long that takes. If all engines die during
        the publish, it starts again when one is back, unless `tensors` is an iterator.

        Args:
            tensors: Pairs of name and tensor with all weights of the model, or a function that returns them.
            version: The number of the version, above that of the last one. By default it is the next number, also
                above those that attached engines reported at first and that are stored. `version` of the report has it.
            label: The trainer's own name for the version, such as its step. `labels` finds it by the version.
            bucket_bytes: The size of the buckets in which tensors are sent, in bytes.
            deadline: Seconds for the engines to take the version.
            require_finite: Refuse NaN and infinite values.

        Raises:
            PublishError: A value is NaN or infinite, the tensors are not the model's, no engine took the version,
                another publish is under way, or `version` is not above the last one.
            NoEngineError: No engine is left.
            ArgumentError: `label` is neither text nor an integer.

        After an error the engines still serve the old version. SGLang and vLLM can't undo an update after its first
        bucket: such an engine serves again after the next publish.

        Example:

            report = await fleet.publish(lambda: list(model.named_parameters()), label=step)
            for name, error in report.failed.items():
                print(f"{name} did not take version {report.version}: {error}")
        """
        self._require_open(deadline)
        return await self._publisher.whole(
            weight_source(tensors),
            version_number(version),
            label_value(label),
            bucket_bytes=bucket_bytes,
            deadline=deadline,
            require_finite=require_finite,
        )

    async def publish_lora(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int | None = None,
        *,
        config: LoraConfig,
        label: Label | None = None,
        deadline: float = 60.0,
        require_finite: bool = True,
    ) -> PublishReport:
        """Publish a LoRA adapter over the last whole version to every usable engine, and return a report.

        The engines generate meanwhile. New requests use the adapter as soon as their engine has loaded it, and their
        version spans have `version`. Running requests complete with the weights that they began with. An engine has at
        most two adapters loaded. If requests still use the older one, this method waits for them for half of
        `deadline`, and then aborts them. Publishing a whole version removes the adapter.

        An engine that does not take the adapter leaves rotation, and is named in the report. If the engine refused it,
        the engine serves again after the next publish.

        Args:
            tensors: Pairs of name and tensor, named as PEFT does: `base_model.model.MODULE.lora_A.weight` and
                `lora_B.weight`.
            version: The number of the version, above that of the last one. By default it is the next number, and
                `version` of the report has it.
            config: The adapter's rank, alpha and target modules.
            label: The trainer's own name for the version, such as its step. `labels` finds it by the version.
            deadline: Seconds for the engines to load the adapter.
            require_finite: Refuse NaN and infinite values.

        Raises:
            PublishError: The tensors are no adapter of this model, no engine can read or take it, a value is NaN or
                infinite, another publish is under way, or `version` is not above the last one. The engines still serve
                the last version.
            NoEngineError: No engine is left.
            ArgumentError: `config` is not a LoraConfig, or `label` is neither text nor an integer.

        Example:

            config = LoraConfig(rank=16, alpha=32.0, target_modules=("q_proj", "v_proj"))
            adapter = peft.get_peft_model_state_dict(model)
            await fleet.publish_lora(adapter.items(), config=config, label=step)
        """
        self._require_open(deadline)
        return await self._publisher.lora(
            source_of(tensors),
            version_number(version),
            label_value(label),
            config=arguments.instance("config", config, LoraConfig),
            deadline=deadline,
            require_finite=require_finite,
        )

    async def restart(
        self, name: str, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE
    ) -> None:
        """End an engine, start it again, and bring it the weights that the others serve.

        The weights come from the store, or from the trainer if `publish` was given a function. If neither has them, the
        engine serves after the next publish.

        Args:
            name: The engine's name, such as "sglang-0".
            bucket_bytes: The size of the buckets in which tensors are sent, in bytes.
            deadline: Seconds to bring the engine the weights. The start itself has its own limit, `start_timeout`.

        Raises:
            LaunchError: The engine does not start.
            PublishError: The engine does not take the version.
            NoEngineError: No engine has this name, or this fleet does not start its engines.
        """
        self._require_open(deadline)
        await self._lifecycle.restart(name, bucket_bytes, deadline)

    async def add(self, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> str:
        """Start one more engine, bring it the weights that the others serve, and return its name.

        The arguments, the source of the weights and the errors are those of `restart`.
        """
        self._require_open(deadline)
        return await self._lifecycle.add(bucket_bytes, deadline)

    async def remove(self, name: str, *, deadline: float = 60.0) -> None:
        """Remove an engine from the fleet, and end its process.

        It gets no more requests. Requests that have not completed within `deadline` seconds are aborted, and continue
        on another engine with the tokens that they have. This costs no retry. Without another engine, they return
        these tokens with the finish reason `abort`.

        Raises NoEngineError if no engine has this name, or if it is being restarted or leaves.
        """
        self._require_open(deadline)
        await self._autoscaler.remove(name, deadline)

    async def preempt(self, name: str, *, deadline: float = 30.0, host: str | None = None) -> None:
        """Remove an engine whose host goes away in `deadline` seconds, and start another in its place.

        It gets no more requests. Its running requests are aborted as soon as another engine serves, and continue there
        with the tokens that they have (see `remove`). The fleet starts the replacement at once, on another host if its
        launcher has several (docs/clusters.md). If there is no room for it, the fleet tries again after growing delays.
        A fleet that does not start its engines gets no replacement. host: the address of the host that goes away, for
        an engine over several; None for all of them.

        Raises NoEngineError if no engine has this name, or if it is being restarted or leaves.

        Example:

            await fleet.preempt("sglang-1", deadline=25.0)
        """
        self._require_open(deadline)
        await self._autoscaler.preempt(name, deadline, host)

    def autoscale(self, limits: ReplicaRange | None) -> None:
        """Let the fleet choose the number of its engines by its load (docs/clusters.md). None ends that.

        Raises NoEngineError if this fleet does not start its engines.
        """
        self._require_open()
        if limits is not None and not self._lifecycle.starts:
            raise NoEngineError("this fleet does not start its engines, and can't be scaled")
        self._autoscaler.limit(limits)

    @property
    def size(self) -> FleetSize:
        """The number of engines that the fleet should have, that serve, and that are being started."""
        return self._autoscaler.size

    @property
    def demand(self) -> int:
        """The requests of this process and its followers that wait for room on an engine, or for the first engine."""
        return self._autoscaler.demand

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY, *, interrupt: bool = False) -> None:
        """Release memory of every usable engine, to lend it to the trainer.

        No engine gets requests from now on. Running requests complete first. An engine that can't sleep is quarantined.
        `wake` gets the memory back.

        Args:
            what: The memory to release: the weights, the KV cache, or by default both. Released weights are lost, so
                publish after waking them (a frozen fleet: call `restore`).
            interrupt: Abort the running requests instead of waiting for them.

        Raises:
            PublishError: The fleet is frozen, and an engine can't read its weights again from the model's folder.
            NoEngineError: No engine is left.
        """
        self._require_open()
        await memory.sleep(self.replicas, self._versions, what, interrupt=interrupt)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Give released memory back to every usable engine.

        An engine whose weights slept serves again after the next publish. An engine that can't wake is quarantined.

        Args:
            what: The memory to give back, by default all of it. Wake the weights before a publish, and the KV cache
                after it.

        Raises:
            NoEngineError: No engine is left.
        """
        self._require_open()
        await memory.wake(self.replicas, self._versions, what)

    @asynccontextmanager
    async def share(self, host: str = "127.0.0.1", port: int = 0, key: str | None = None) -> AsyncIterator[SharedFleet]:
        """Let other processes follow this fleet while the context is open (docs/sharing.md).

        Each of them opens `millrace.follow_fleet` with the URL and the key, and sends its own requests to the engines.
        This process owns the fleet: it alone publishes, and puts engines to sleep.

        Args:
            host: The address to answer at. By default only processes on this host can follow. The key and the engines'
                keys are sent without encryption, so pass an address of a network that you trust.
            port: The port to answer at; 0 for any free port. With a fixed port and key, followers find the next owner.
            key: The key that followers need. By default a new one.

        Yields:
            The URL and the key. The URL of 0.0.0.0 is that for this host.

        Raises:
            ConfigError: The address or the port can't be used.
            ArgumentError: An argument has the wrong type.

        Example:

            async with fleet.share() as shared:
                start_worker(shared.url, shared.key)
        """
        self._require_open()
        async with serve_followers(self, host, port, key) as shared:
            yield shared

    @property
    def version(self) -> int | None:
        return self._versions.last

    @property
    def dtypes(self) -> Dtypes | None:
        """The dtypes of the engines' weights. Published tensors are cast to them. None before `attest`. `leading`
        (`millrace.weights.sharded`) takes them, to gather fewer bytes."""
        return self._versions.dtypes

    @property
    def frozen(self) -> bool:
        """Whether the engines keep the weights of their start, so that nothing is published to them."""
        return self._versions.frozen

    async def restore(self, *, bucket_bytes: int = BUCKET_BYTES, deadline: float = CATCH_UP_DEADLINE) -> None:
        """Wake a frozen fleet, whose weights may have slept.

        The engines read lost weights again from the model's folder, are attested as after a publish, and then get their
        KV cache back. An engine that does not take the weights is quarantined, and restarted if the fleet restarts its
        engines.

        Args:
            bucket_bytes: The size of the buckets in which tensors are read, in bytes.
            deadline: Seconds for the engines to read the weights.

        Raises:
            PublishError: The fleet is not frozen.
            NoEngineError: No engine is left.
        """
        self._require_open(deadline)
        await memory.restore(self.replicas, self._versions, bucket_bytes, deadline)

    async def attest(self, checksums: Mapping[str, str], version: int, folder: Path) -> None:
        """Take the engines into rotation that loaded these weights from `folder` when they started.

        `checksums` are those of the folder's tensors. They are converted to the engines' dtypes, and compared with
        those that the engines report. A tensor that an engine makes while loading (fused or tied) has no counterpart:
        it is logged, and not compared. An engine that reports no checksums is trusted if it was started here from this
        folder. An attached engine with other weights is compared with the last stored version.

        Raises NoEngineError if no engine is left.
        """
        infos = [replica.info for replica in self.replicas.by_name.values()]
        origin = await Origin.read(infos, checksums, version, folder)
        self._versions.begin_with(origin, infos)
        await self.replicas.each(lambda replica: self._versions.recognize(replica, origin))

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        self._require_published()
        if self.external_router is None:
            return await self._sender.generate(request, routing, deadline)
        return await self.external_router.generate(request, routing, deadline=deadline, direct=self._sender.generate)

    def _require_published(self) -> None:
        """Raises NoEngineError if all engines are up and awake, and none serves before the first publish."""
        states = self.snapshot.replicas
        waits = self.replicas.coming or self.asleep or self._versions.published or self._versions.publishing
        if not waits and states and all(state.version is None and state.phase is Phase.STARTING for state in states):
            raise NoEngineError(
                "no engine serves before the first publish, since the engines' weights could not be compared with the "
                f"model's folder; publish a version, or open the fleet with frozen=True; {self.snapshot.describe()}"
            )

    def _interrupting(self) -> AbstractContextManager[None]:
        """Return a context for a publish, which interrupts the requests in the external router."""
        return nullcontext() if self.external_router is None else self.external_router.publishing()


class _Observer:
    """The FleetObserver of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def replica_changed(self, before: ReplicaState, after: ReplicaState) -> None:
        if not after.routable or after.version != before.version:
            self._fleet._router.forget(after.name)
        self._fleet._lifecycle.changed(after)
        if self._fleet._kept is not None:
            self._fleet._kept.changed(after)

    def replica_removed(self, name: str) -> None:
        if self._fleet._kept is not None:
            self._fleet._kept.forget(name)

    def noticed(self, replica: Replica, seconds: float) -> None:
        self._fleet._autoscaler.noticed(replica, seconds)

    def watching(self, replica: Replica) -> AbstractAsyncContextManager[None]:
        return self._fleet._feeds.listening(replica.engine.name, replica.kv_events)

    def is_idle(self, name: str) -> bool:
        router = self._fleet.external_router
        return not (self._fleet.outstanding.get(name) or (router is not None and router.uses(name)))
