"""Runs fault steps on a fleet of real engines, one after the other, and checks the fleet after each."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.config.engines import EngineConfig
from millrace.config.models import TransportName
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import EngineError, NoEngineError, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet, transport_for
from millrace.fleet.replica_state import Phase
from millrace.types import Capability, Generation
from millrace.weights.publisher import ROLLBACK_DEADLINE
from tests.fleet.signals import kill_engine, send_signal
from tests.weights.corruption import CorruptingTransport, Corruption, corrupt_folder
from tests.weights.faults import (
    HARMLESS,
    Bad,
    Corrupt,
    CorruptStore,
    Fault,
    Hang,
    Kill,
    Publish,
    Refuse,
    Restart,
    Source,
    Step,
    SwitchTransport,
    TrainerError,
    damaged,
)
from tests.weights.oracle import TIMEOUT, Oracle, Status, Statuses, check_store
from tests.weights.variants import (
    LONG,
    PROMPTS,
    Prompt,
    Tokens,
    Variant,
    greedy_request,
    require_distinct,
)

BUCKET = 160 * 1024  # bytes; a model takes four buckets
SECONDS_PER_STEP = 0.004  # slows down the embedded engine, so that its generations last as long as a step


async def run(
    steps: Iterable[Step],
    config: EngineConfig,
    variants: Sequence[Variant],
    references: Sequence[Tokens],
    place: Path,
    *,
    deadline: float,
) -> None:
    """Takes the steps, publishes once more, and checks the version store. `deadline` is that of a publish in which an
    engine hangs, in seconds."""
    require_distinct(references)
    kept = place / "versions"
    async with open_fleet(config, variants[0].folder, log_dir=place, folder=kept) as fleet:
        oracle = Oracle(fleet, variants, references)
        async with opened(Machine(fleet, oracle, place, deadline)) as machine:
            for step in [*steps, Publish()]:
                await machine.take(step)
    check_store(kept, oracle)


@asynccontextmanager
async def opened(machine: "Machine") -> "AsyncIterator[Machine]":
    await machine.begin()
    try:
        yield machine
    finally:
        await machine.close()


class Machine:
    """Takes steps and compares the fleet with the oracle. A number in a step picks one of the engines that the step can
    happen to."""

    def __init__(self, fleet: Fleet, oracle: Oracle, place: Path, deadline: float) -> None:
        self._fleet, self._oracle, self._place, self._deadline = fleet, oracle, place, deadline
        self._transport_name, self._transport = "auto", self._corrupting("auto")

    async def begin(self) -> None:
        self._fleet._versions.transport = self._transport
        for name in self._fleet.engines:
            await self._slow_down(name)
        await self._oracle.check()

    async def close(self) -> None:
        """Closes the current transport. The fleet closes the one that it was opened with."""
        await self._transport.close()

    async def take(self, step: Step) -> None:
        """Takes one step while generations run, then checks the fleet and the generations."""
        print(f"{time.monotonic():.1f} {step}")
        before = self._oracle.published
        background = await self._generating(self._deadline if isinstance(step, Hang) else TIMEOUT)
        try:
            expected = await self._happen(step)
        finally:
            made = await asyncio.gather(*background.values(), return_exceptions=True)
        self._oracle.observe(expected)
        await self._oracle.check()
        for prompt, one in zip(background, made, strict=True):
            if isinstance(one, Generation):
                print("  ", [(span.version, span.end) for span in one.version_spans])
                await self._oracle.check_generation(prompt, one, {before, self._oracle.published})
            else:
                assert isinstance(one, EngineError | NoEngineError), one
                assert self._may_fail(step), one

    def _may_fail(self, step: Step) -> bool:
        """Whether requests in flight may fail in this step."""
        if isinstance(step, Publish | SwitchTransport):
            return False
        return not isinstance(step, Bad) or not (self._oracle.can_roll_back or step.fault in HARMLESS)

    # The steps. Each returns the statuses that the engines may have afterwards

    async def _happen(self, step: Step) -> Statuses:
        match step:
            case Publish():
                failed = await self._publish()
                assert failed == (set() if self._oracle.usable else None)
                return self._oracle.after_publish(set())
            case Bad(fault):
                return await self._bad(fault)
            case CorruptStore(engine):
                return await self._corrupt_store(self._to_restart(engine))
            case Restart(engine):
                return await self._restart(self._to_restart(engine))
            case SwitchTransport(transport):
                return await self._switch_transport(transport)
        usable = self._oracle.usable
        if not usable:
            return self._oracle.unchanged()
        name = None if step.engine is None else usable[step.engine % len(usable)]
        match step:
            case Kill(_, midway):
                return await self._kill(usable[step.engine % len(usable)], midway)
            case Hang(_, resumes):
                return await self._hang(usable[step.engine % len(usable)], resumes)
            case Refuse():
                return await self._refuse(usable[step.engine % len(usable)])
            case Corrupt():
                return await self._corrupt(name)

    def _to_restart(self, engine: int) -> str:
        """Picks an engine to restart, one that is out if there is any."""
        names = [name for name, found in self._oracle.statuses.items() if found is Status.OUT] or list(
            self._oracle.statuses
        )
        return names[engine % len(names)]

    async def _publish(
        self, happens: Callable[[], object] = lambda: None, deadline: float = TIMEOUT
    ) -> set[str] | None:
        """Publishes other weights than the served ones as the next version. A failed attempt may have used the same
        number. Returns the engines that did not take the version, or None if no engine did."""
        variant, version = self._oracle.next_variant(), self._oracle.published + 1
        source = Source(self._oracle.variants[variant].tensors, happens)
        try:
            async with asyncio.timeout(deadline + ROLLBACK_DEADLINE + 5.0):
                report = await self._fleet.publish(source, version, bucket_bytes=BUCKET, deadline=deadline)
        except (PublishError, NoEngineError) as error:
            print("  ", error)
            return None
        print("  ", report.failed)
        assert report.unstored is None
        self._oracle.record_publish(version, variant)
        return set(report.failed)

    async def _bad(self, fault: Fault) -> Statuses:
        if fault == "again":
            loop = asyncio.get_running_loop()

            def again() -> None:
                with pytest.raises(PublishError, match="another version is being published"):
                    asyncio.run_coroutine_threadsafe(self._fleet.publish([], self._oracle.published + 2), loop).result(
                        TIMEOUT
                    )

            assert await self._publish(again) == (set() if self._oracle.usable else None)
            return self._oracle.after_publish(set())
        tensors = damaged(self._oracle.variants[self._oracle.next_variant()].tensors, fault)
        version = self._oracle.published + (fault != "older")

        def raises() -> None:
            raise TrainerError(fault)

        happens: dict[Fault, Callable[[], object]] = {
            "raises": raises,
            "cancelled": lambda: task.get_loop().call_soon_threadsafe(task.cancel),
        }
        source = Source(tensors, happens.get(fault, lambda: None))
        task = asyncio.create_task(
            self._fleet.publish(
                iter(source) if fault == "iterator" else source,
                version,
                bucket_bytes=BUCKET,
            )
        )
        raised = {"raises": TrainerError, "cancelled": asyncio.CancelledError}.get(fault, PublishError)
        with pytest.raises(raised if self._oracle.usable else (NoEngineError, PublishError)) as caught:
            await task
        print("  ", repr(caught.value))
        return self._oracle.unchanged() if fault in HARMLESS else self._oracle.after_failed_publish()

    async def _kill(self, name: str, midway: bool) -> Statuses:
        if not midway:
            kill_engine(self._fleet, name)
            await until(lambda: not self._fleet.snapshot.get(name).usable)
            return self._oracle.unchanged() | {name: {Status.OUT}}
        failed = await self._publish(lambda: kill_engine(self._fleet, name))
        assert failed == ({name} if self._oracle.others(name) else None)
        # A publish that no engine took marks none as failed. The fleet has to notice the death by itself.
        await until(lambda: not self._fleet.snapshot.get(name).usable)
        return self._oracle.after_publish({name})

    async def _hang(self, name: str, resumes: bool) -> Statuses:
        """A single engine is resumed in any case, since nothing but a request has to notice that it hangs."""
        others, version = self._oracle.others(name), self._oracle.published + 1

        async def resume() -> None:
            await until(lambda: all(self._fleet.snapshot.get(other).version == version for other in others))
            send_signal(self._fleet, name, signal.SIGCONT)

        stop = lambda: send_signal(self._fleet, name, signal.SIGSTOP)  # noqa: E731
        if others and resumes:
            failed, _ = await asyncio.gather(self._publish(stop, self._deadline), resume())
        else:
            failed = await self._publish(stop, self._deadline)
        if not others:
            send_signal(self._fleet, name, signal.SIGCONT)
            assert failed is None
            await until(lambda: self._fleet.snapshot.get(name).phase is not Phase.SUSPECT)
            return self._oracle.unchanged() | {name: {Status.OUT, self._oracle.statuses[name]}}
        assert failed == {name}
        return self._oracle.after_publish({name})

    async def _corrupt(self, name: str | None) -> Statuses:
        """Corrupts a publish. Engines that are not compared with the sent weights are compared with each other. That
        does not show which of them is wrong. It does not find a corruption of all engines or of the only one, so this
        step skips those."""
        if not self._oracle.attests(self._transport_name) and (name is None or len(self._oracle.usable) == 1):
            return self._oracle.unchanged()
        self._transport.corruption = Corruption(name, whole=not self._oracle.can_roll_back)
        failed = await self._publish()
        assert self._transport.done
        if self._oracle.can_roll_back:
            assert failed == ({name} if name is not None and self._oracle.others(name) else None)
            return self._oracle.after_publish({name}) if failed and name else self._oracle.unchanged()
        if failed is None:
            return self._oracle.after_failed_publish() | {one: {Status.EMPTY} for one in self._oracle.usable}
        assert name in failed
        return self._oracle.after_publish(failed) | {one: {Status.EMPTY, Status.OUT} for one in failed}

    async def _refuse(self, name: str) -> Statuses:
        engine = self._fleet.engines[name]
        if not isinstance(engine, EmbeddedEngine):
            return self._oracle.unchanged()
        await engine.inject_fault("refuse_update", count=1)
        failed = await self._publish()
        assert failed == ({name} if self._oracle.others(name) else None)
        return self._oracle.after_publish({name}) if failed else self._oracle.unchanged()

    async def _corrupt_store(self, name: str) -> Statuses:
        if not self._oracle.published or self._oracle.store_corrupted:
            return self._oracle.unchanged()
        assert await self._fleet._versions.storing.secured() is None
        corrupt_folder(
            self._place / "versions" / f"version-{self._oracle.published:08d}",
            Corruption(None, not self._oracle.can_roll_back),
        )
        self._oracle.store_corrupted = True
        return await self._restart(name)

    async def _restart(self, name: str) -> Statuses:
        """Without a usable store, an engine gets its weights from another one that serves, if that can give them."""
        serves = not self._oracle.store_corrupted or any(
            Capability.UPDATE_FROM_PEER in self._fleet.replicas.by_name[other].info.capabilities
            for other, found in self._oracle.statuses.items()
            if other != name and found is Status.SERVING
        )
        if serves:
            await self._fleet.restart(name, bucket_bytes=BUCKET)
        else:
            with pytest.raises(PublishError):
                await self._fleet.restart(name, bucket_bytes=BUCKET)
        await self._slow_down(name)
        return self._oracle.unchanged() | {name: {Status.SERVING if serves else Status.EMPTY}}

    async def _switch_transport(self, name: TransportName) -> Statuses:
        before, self._transport = self._transport, self._corrupting(name)
        self._transport_name = name
        self._fleet._versions.transport = self._transport
        await before.close()
        return self._oracle.unchanged()

    # Helpers

    def _corrupting(self, name: TransportName) -> CorruptingTransport:
        inner = transport_for(name, list(self._fleet.replicas.by_name.values()), self._fleet._versions.store)
        assert inner is not None
        return CorruptingTransport(inner, self._place)

    async def _generating(self, deadline: float) -> dict[Prompt, "asyncio.Task[Generation]"]:
        """Starts long generations, and returns once the first of them runs."""
        serving = [
            self._fleet.engines[name] for name, found in self._oracle.statuses.items() if found is Status.SERVING
        ]
        if not serving:
            return {}
        requests = [greedy_request(prompt, self._oracle.name(), LONG) for prompt in PROMPTS]
        tasks = [asyncio.create_task(self._fleet.generate(request, deadline=deadline)) for request in requests]
        while not any(task.done() for task in tasks):
            if any([(await engine.loads()).running_requests for engine in serving]):
                break
        return dict(zip(PROMPTS, tasks, strict=True))

    async def _slow_down(self, name: str) -> None:
        engine = self._fleet.engines[name]
        if isinstance(engine, EmbeddedEngine):
            await engine.inject_fault("slow", seconds=SECONDS_PER_STEP)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)
