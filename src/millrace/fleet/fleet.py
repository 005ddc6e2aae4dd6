"""The replicas of one model as one: it routes requests, publishes versions, sleeps and wakes, and knows who has
died."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.engines.start import Started
from millrace.errors import EngineError, EngineFailed, EngineUnreachable, NoEngineError, PublishError
from millrace.fleet.membership import Attested, Died, Distrusted, Event, Member, Slept, Snapshot, Woke, after
from millrace.fleet.routing import least_loaded, with_adapter
from millrace.fleet.versions import Origin, Versions
from millrace.types import ALL_MEMORY, AdapterConfig, GenerateRequest, Generation, Health, MemoryTag
from millrace.weights.publisher import PublishReport
from millrace.weights.transports.base import PublishTarget, Transport

if TYPE_CHECKING:
    import torch

    from millrace.weights.store import VersionStore

PROCESS_END_DEADLINE = 3.0  # from a closed port to the end of the process, which tells more of the reason

logger = logging.getLogger(__name__)


class Fleet:
    """Made by `Fleet.open`, which also ends what it started.

    All methods belong to one event loop. `snapshot` is the truth about the members; requests in flight are counted
    here.
    """

    def __init__(
        self,
        replicas: Sequence[Started],
        transport: Transport | None,
        store: "VersionStore | None" = None,
        start: Callable[[int], Awaitable[Started]] | None = None,
    ) -> None:
        self._replicas = {replica.engine.name: replica for replica in replicas}
        self._versions = Versions(transport, store, self._apply)
        self._start = start
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._outstanding: dict[str, int] = dict.fromkeys(self._replicas, 0)
        self._changed = asyncio.Condition()
        self.snapshot = Snapshot(0, tuple(Member(r.engine.name, r.engine.url) for r in replicas))

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        replicas: Sequence[Started],
        transport: Transport | None,
        store: "VersionStore | None" = None,
        start: Callable[[int], Awaitable[Started]] | None = None,
    ) -> "AsyncIterator[Fleet]":
        """Watches the replicas' processes as long as the block runs, and in the end closes the transport, the store,
        the engines' connections and the processes. `store` keeps what is published; `start` starts the replica of that
        number anew."""
        fleet = cls(replicas, transport, store, start)
        for replica in replicas:
            fleet._begin_to_watch(replica)
        try:
            yield fleet
        finally:
            await asyncio.gather(*(fleet._end_watching(name) for name in fleet._replicas))
            await fleet._versions.close()
            await asyncio.gather(*(replica.end() for replica in fleet._replicas.values()))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together that every engine takes."""
        return min(replica.info.context_length for replica in self._replicas.values())

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {name: replica.engine for name, replica in self._replicas.items()}

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        """Sends the request to the least loaded engine, and waits for one where all sleep or are being updated.

        Raises NoEngineError when none is routable by the deadline or none is left, and the engine's own EngineError
        otherwise; a request that failed on an engine is not sent again by this method.
        """
        end = time.monotonic() + deadline
        name = await self._route(deadline)
        member, own = self.snapshot.get(name), "lora_path" in request.extra
        adapter = None if own else member.adapter
        if adapter is not None:
            request = replace(request, extra={**request.extra, "lora_path": adapter})
        tokens = len(request.input_ids) + request.sampling.max_new_tokens
        self._outstanding[name] += tokens
        try:
            with self._versions.adapters.using(name, adapter, request.request_id):
                made = await self._replicas[name].engine.generate(request, deadline=end - time.monotonic())
            return made if adapter is None else with_adapter(made, member.version)
        except (EngineUnreachable, EngineFailed) as error:
            await self._suspect(name, error)
            raise
        finally:
            self._outstanding[name] -= tokens

    async def publish(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        *,
        bucket_bytes: int = 256 * 2**20,
        deadline: float = 120.0,
        require_finite: bool = False,
    ) -> PublishReport:
        """Brings a version into every usable engine; one that does not take it is quarantined and named in the report.

        `tensors` is consumed lazily and in a thread; with `require_finite` also once before, and a NaN or an infinite
        value raises PublishError. So it does when no engine takes the version, when another publish is under way, or
        when `version` is not above the last one; whatever is raised, the old version goes on serving where it was,
        unless the engine's update had begun and can't be undone (SGLang, vLLM): such an engine serves again after the
        next publish.

        Where versions are kept, `tensors` is gone through once more when the engines serve, and can't be an iterator.
        The version becomes safe in the background; the next publish waits for that.
        """
        left_out = self._left_out()
        report = await self._versions.publish(
            tensors,
            version,
            self._targets,
            bucket_bytes=bucket_bytes,
            deadline=deadline,
            require_finite=require_finite,
        )
        return replace(report, left_out=left_out)

    async def publish_adapter(
        self,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        version: int,
        *,
        config: AdapterConfig,
        deadline: float = 60.0,
        require_finite: bool = False,
    ) -> PublishReport:
        """Brings a LoRA adapter over the last whole version into every usable engine, while these go on generating.

        `tensors` are named as PEFT does, `base_model.model.MODULE.lora_A.weight` and `lora_B`. Requests that begin when
        an engine has it are made with it, and their segments say `version`; those that run end with what they began
        with. Two adapters at most are loaded in an engine: where requests still run with the one before the last, it is
        waited for them for half of `deadline`, and then they are aborted.

        An engine that does not take the adapter is out of rotation and named in the report; where it only said no, it
        serves again after the next one. PublishError is raised, and what served before goes on serving, when the
        tensors are not those of such an adapter of the model, when no engine takes it or none can read it, and as
        `publish` says. A version that is published whole takes the adapter off.
        """
        left_out = self._left_out()
        report = await self._versions.publish_adapter(
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
        return [PublishTarget(self._replicas[m.name].engine, self._replicas[m.name].info) for m in members]

    async def restart(self, name: str, *, bucket_bytes: int = 256 * 2**20, deadline: float = 120.0) -> None:
        """Ends this engine, starts it anew, and brings it from the store what the others serve, within `deadline`
        seconds, before its first request. Without a store it serves after the next publish. Raises LaunchError where it
        does not come up, PublishError where it does not take the version, and NoEngineError where the fleet does not
        start its engines."""
        if self._start is None:
            raise NoEngineError(f"{name} was not started by this fleet, which can't start it anew")
        if name not in self._replicas:
            raise NoEngineError(f"no engine is called {name}: {self.snapshot.describe()}")
        old = self._replicas[name]
        await self._end_watching(name)
        await self._apply(name, Died("it is being started anew"))
        await old.end()
        self._versions.adapters.forget(name)
        started = await self._start(list(self._replicas).index(name))
        self._replicas[name] = started
        self._begin_to_watch(started)
        async with self._changed:
            self.snapshot = self.snapshot.with_member(Member(name, started.engine.url))
        await self._versions.catch_up(started, bucket_bytes, deadline)

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Puts every usable engine to sleep, after what runs there has ended. One that can't is quarantined."""
        # Out of rotation first: a request that came between the drain and the release would fail.
        for member in self.snapshot.members:
            await self._apply(member.name, Slept(what))
        await self._each(lambda engine: engine.sleep(what))

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Wakes every usable engine. One whose weights slept serves again after the next publish."""
        await self._each(lambda engine: engine.wake(what))
        for member in self.snapshot.members:
            await self._apply(member.name, Woke(what))

    async def attest(self, checksums: Mapping[str, str], version: int, folder: Path) -> None:
        """Takes the engines into rotation that hold these tensors: for weights that they loaded by themselves from
        `folder`. A tensor that the engine makes while loading (fused, tied) has no counterpart and is not compared; the
        log names it. An engine that has no checksums to compare is taken at its word, if it was started here and names
        this folder."""

        origin = Origin(checksums, version, folder)
        await self._each(lambda engine: self._versions.compare(self._replicas[engine.name], origin, Attested(version)))
        self._versions.begin_with(origin)

    async def _each(self, step: Callable[[Engine], Awaitable[None]]) -> None:
        """Takes one step on every usable engine at once. One that fails it is quarantined, with the reason."""

        async def guarded(name: str) -> None:
            try:
                await step(self._replicas[name].engine)
            except EngineError as error:
                logger.error("out of rotation: %s", error)
                await self._apply(name, Distrusted(str(error)))

        async with asyncio.TaskGroup() as group:
            for member in self.snapshot.members:
                if member.usable:
                    group.create_task(guarded(member.name))
        if not self.snapshot.usable:
            raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")

    async def _route(self, deadline: float) -> str:
        name = least_loaded(self.snapshot, self._outstanding)
        if name is not None:
            return name
        try:
            async with asyncio.timeout(deadline), self._changed:
                while (name := least_loaded(self.snapshot, self._outstanding)) is None:
                    if not self.snapshot.usable:
                        raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")
                    await self._changed.wait()
                return name
        except TimeoutError:
            raise NoEngineError(f"no engine could serve within {deadline:.0f} s: {self.snapshot.describe()}") from None

    async def _suspect(self, name: str, error: EngineError) -> None:
        """After a failed call: dead if its process or its port says so, otherwise the benefit of the doubt."""
        replica = self._replicas[name]
        if await replica.engine.health() is not Health.DEAD:
            return
        if replica.process is not None:
            try:
                async with asyncio.timeout(PROCESS_END_DEADLINE):
                    await replica.process.wait()
                return  # its watcher says how it ended
            except TimeoutError:
                pass  # it lives, but nothing listens at its port
        await self._apply(name, Died(str(error)))

    def _begin_to_watch(self, replica: Started) -> None:
        if replica.process is not None:
            self._watchers[replica.engine.name] = asyncio.create_task(self._watch(replica))

    async def _end_watching(self, name: str) -> None:
        if (watcher := self._watchers.pop(name, None)) is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self, replica: Started) -> None:
        assert replica.process is not None
        await replica.process.wait()
        reason = replica.process.describe_end()
        logger.error("%s\n%s", reason, replica.process.log_tail())
        await self._apply(replica.engine.name, Died(reason))

    async def _apply(self, name: str, event: Event) -> None:
        async with self._changed:
            self.snapshot = self.snapshot.with_member(after(self.snapshot.get(name), event))
            self._changed.notify_all()
