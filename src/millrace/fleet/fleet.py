"""The replicas of one model as one: it routes requests, publishes versions, sleeps and wakes, and knows who has
died."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.engines.start import Started
from millrace.errors import EngineError, EngineFailed, EngineUnreachable, NoEngineError, PublishError
from millrace.fleet.journal import Journal
from millrace.fleet.membership import (
    Answered,
    Attested,
    CatchingUp,
    Died,
    Distrusted,
    Emptied,
    Event,
    Leaving,
    Member,
    Phase,
    Slept,
    Snapshot,
    Struck,
    Woke,
    after,
)
from millrace.fleet.recovery import Recovery
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
        restarts: int = 0,
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal if journal is not None else Journal()
        self._replicas = {replica.engine.name: replica for replica in replicas}
        self._numbers = {replica.engine.name: number for number, replica in enumerate(replicas)}
        self._versions = Versions(transport, store, self._apply)
        self._start = start
        self._asleep: frozenset[MemoryTag] = frozenset()
        self._renewed: set[str] = set()  # whose end is wanted: they are started anew, or leave
        self._recovery = Recovery(
            limit=restarts if start is not None else 0,
            engines=lambda: self.engines,
            snapshot=lambda: self.snapshot,
            apply=self._apply,
            restart=self._restart,
            awake=self._awake,
            gave_up=self._tell,
        )
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._outstanding: dict[str, int] = dict.fromkeys(self._replicas, 0)
        self._changed = asyncio.Condition()
        self.snapshot = Snapshot(0, tuple(Member(r.engine.name, r.engine.url) for r in replicas))
        for member in self.snapshot.members:
            self.journal.changed(None, member)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        replicas: Sequence[Started],
        transport: Transport | None,
        store: "VersionStore | None" = None,
        start: Callable[[int], Awaitable[Started]] | None = None,
        restarts: int = 0,
        journal: Journal | None = None,
    ) -> "AsyncIterator[Fleet]":
        """Watches the replicas' processes as long as the block runs, and in the end closes the transport, the store,
        the engines' connections and the processes. `store` keeps what is published; `start` starts the replica of that
        number anew, which happens by itself so many times in a row (`restarts`)."""
        fleet = cls(replicas, transport, store, start, restarts, journal)
        for replica in replicas:
            fleet._begin_to_watch(replica)
        fleet._recovery.begin()
        try:
            yield fleet
        finally:
            await fleet._recovery.close()
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

    @property
    def outstanding(self) -> Mapping[str, int]:
        """Of each engine: tokens of the requests that it has, prompts and room for output."""
        return dict(self._outstanding)

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        """Sends the request to the least loaded engine, and waits for one where all sleep, are being updated or are
        started anew.

        Raises NoEngineError when none is routable by the deadline or none is left, and the engine's own EngineError
        otherwise; a request that failed on an engine is not sent again by this method.
        """
        end = time.monotonic() + deadline
        with self.journal.waiting():
            name = await self._route(deadline)
        member, own = self.snapshot.get(name), "lora_path" in request.extra
        adapter = None if own else member.adapter
        if adapter is not None:
            request = replace(request, extra={**request.extra, "lora_path": adapter})
        tokens = len(request.input_ids) + request.sampling.max_new_tokens
        self._outstanding[name] += tokens
        try:
            with (
                self.journal.request(name) as asked,
                self._versions.adapters.using(name, adapter, request.request_id),
            ):
                made = asked.made = await self._replicas[name].engine.generate(request, deadline=end - time.monotonic())
            if self.snapshot.has(name) and self.snapshot.get(name).strikes:
                await self._apply(name, Answered())
            return made if adapter is None else with_adapter(made, member.version)
        except (EngineUnreachable, EngineFailed) as error:
            await self._suspect(name, error)
            raise
        finally:
            self._outstanding[name] -= tokens
            if not self._outstanding[name] and name in self._renewed:
                await self._tell()

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
        await self._until(lambda: self.snapshot.usable, deadline)
        left_out = self._left_out()
        with self.journal.publishing(version) as publishing:
            report = publishing.report = await self._versions.publish(
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
        with self.journal.publishing(version, adapter=True) as publishing:
            report = publishing.report = await self._versions.publish_adapter(
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
        await self._recovery.forget(name)
        await self._restart(name, bucket_bytes, deadline)

    async def _restart(self, name: str, bucket_bytes: int = 256 * 2**20, deadline: float = 120.0) -> None:
        assert self._start is not None
        if name in self._renewed:
            raise NoEngineError(f"{name} is being started anew, or leaves")
        self._renewed.add(name)
        try:
            with self.journal.restarting(name):
                await self._end(name, "it is being started anew")
                await self._begin(await self._start(self._numbers[name]), bucket_bytes, deadline)
        finally:
            self._renewed.discard(name)

    async def add(self, *, bucket_bytes: int = 256 * 2**20, deadline: float = 120.0) -> str:
        """Starts one more engine like the others, and brings it what these serve before its first request, as `restart`
        does. Returns its name."""
        if self._start is None:
            raise NoEngineError("this fleet does not start its engines, and can't start one more")
        number = max(self._numbers.values(), default=-1) + 1
        started = await self._start(number)
        self._numbers[started.engine.name] = number
        await self._begin(started, bucket_bytes, deadline)
        return started.engine.name

    async def remove(self, name: str, *, deadline: float = 60.0) -> None:
        """Takes an engine out: it gets no more requests, ends those that it has, for which it gets `deadline` seconds
        before they are aborted, and its process is ended."""
        if not self.snapshot.has(name):
            raise NoEngineError(f"no engine is called {name}: {self.snapshot.describe()}")
        await self._recovery.forget(name)
        self._renewed.add(name)
        try:
            await self._apply(name, Leaving())
            try:
                async with asyncio.timeout(deadline), self._changed:
                    await self._changed.wait_for(lambda: not self._outstanding[name])
            except TimeoutError:
                logger.warning("%s leaves, and what it still generates is aborted", name)
                with suppress(EngineError):
                    await self._replicas[name].engine.abort()
            await self._end(name, "it has left")
            async with self._changed:
                self.snapshot = self.snapshot.without(name)
                self.journal.removed(name)
                self._changed.notify_all()
            for known in (self._replicas, self._numbers):
                known.pop(name)
        finally:
            self._renewed.discard(name)

    async def _end(self, name: str, reason: str) -> None:
        await self._end_watching(name)
        await self._apply(name, Died(reason))
        await self._replicas[name].end()
        self._versions.adapters.forget(name)

    async def _begin(self, started: Started, bucket_bytes: int, deadline: float) -> None:
        """Takes a new engine in, and brings it what the others serve."""
        name = started.engine.name
        self._replicas[name] = started
        self._outstanding.setdefault(name, 0)
        self._begin_to_watch(started)
        async with self._changed:
            self.snapshot = self.snapshot.with_member(member := Member(name, started.engine.url))
            self.journal.changed(None, member)
        await self._apply(name, CatchingUp())
        await self._versions.catch_up(started, bucket_bytes, deadline)
        if self.snapshot.get(name).phase is Phase.CATCHING_UP:  # nobody has what the others serve
            await self._apply(name, Emptied())

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Puts every usable engine to sleep, after what runs there has ended. One that can't is quarantined."""
        self._asleep |= what
        # Out of rotation first: a request that came between the drain and the release would fail.
        for member in self.snapshot.members:
            await self._apply(member.name, Slept(what))
        await self._each(lambda engine: engine.sleep(what))

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Wakes every usable engine. One whose weights slept serves again after the next publish."""
        await self._each(lambda engine: engine.wake(what))
        async with self._changed:
            self._asleep -= what
            self._changed.notify_all()
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
        if not self.snapshot.usable and not self._recovery.hopeful:
            raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")

    async def _route(self, deadline: float) -> str:
        await self._until(lambda: least_loaded(self.snapshot, self._outstanding) is not None, deadline)
        name = least_loaded(self.snapshot, self._outstanding)
        assert name is not None
        return name

    async def _until(self, condition: Callable[[], bool], deadline: float) -> None:
        """Waits for something that only an engine can bring about. Raises NoEngineError when there is none left, or the
        deadline passes."""
        if condition():
            return
        try:
            async with asyncio.timeout(deadline), self._changed:
                while not condition():
                    if not self.snapshot.usable and not self._recovery.hopeful:
                        raise NoEngineError(f"no engine is left: {self.snapshot.describe()}")
                    await self._changed.wait()
        except TimeoutError:
            raise NoEngineError(f"no engine could serve within {deadline:.0f} s: {self.snapshot.describe()}") from None

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _awake(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: MemoryTag.WEIGHTS not in self._asleep)

    async def _suspect(self, name: str, error: EngineError) -> None:
        """After a failed call: dead if its process or its port says so, otherwise suspect after some of them."""
        replica = self._replicas.get(name)
        if replica is None:  # it has left
            return
        if await replica.engine.health() is not Health.DEAD:
            await self._apply(name, Struck(str(error)))
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
        if not self.snapshot.has(name):
            return  # it has left
        before = self.snapshot.get(name)
        member = after(before, event)
        if member == before:
            return
        if member.phase in (Phase.DEAD, Phase.QUARANTINED) and name not in self._renewed:
            self._recovery.lost(name)
        async with self._changed:
            self.snapshot = self.snapshot.with_member(member)
            self.journal.changed(before, member)
            self._changed.notify_all()
