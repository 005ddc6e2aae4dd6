"""A fleet of real engines to which anything happens: one step after the other, each followed by what must hold."""

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
from millrace.types import Generation
from millrace.weights.publisher import ROLLBACK_DEADLINE
from tests.fleet.strike import strike
from tests.weights.faults import (
    HARMLESS,
    Bad,
    Corrupt,
    Fault,
    Hang,
    Kill,
    Publish,
    Refuse,
    Restart,
    Source,
    Spoil,
    Step,
    TrainerError,
    Travel,
    damaged,
)
from tests.weights.meddling import Damage, MeddlingTransport, spoil_folder
from tests.weights.truth import PATIENCE, Fate, Fates, Truth, require_kept
from tests.weights.variants import (
    LONG,
    PROMPTS,
    Prompt,
    Tokens,
    Variant,
    greedy_request,
    require_distinct,
)

BUCKET = 160 * 1024  # a model takes four
SECONDS_PER_STEP = 0.004  # of the embedded engine, so that its generations last as long as a step of the machine


async def run(
    steps: Iterable[Step],
    config: EngineConfig,
    variants: Sequence[Variant],
    references: Sequence[Tokens],
    place: Path,
    *,
    deadline: float,
) -> None:
    """Takes these steps, and publishes once more in the end; what was kept is looked at then. `deadline`: of a publish
    in which an engine hangs."""
    require_distinct(references)
    kept = place / "versions"
    async with open_fleet(config, variants[0].folder, log_dir=place, folder=kept) as fleet:
        truth = Truth(fleet, variants, references)
        async with opened(Machine(fleet, truth, place, deadline)) as machine:
            for step in [*steps, Publish()]:
                await machine.take(step)
    require_kept(kept, truth)


@asynccontextmanager
async def opened(machine: "Machine") -> "AsyncIterator[Machine]":
    await machine.begin()
    try:
        yield machine
    finally:
        await machine.close()


class Machine:
    """Takes steps, and compares the fleet with what must hold. A number in a step chooses among the engines to which
    it can happen."""

    def __init__(self, fleet: Fleet, truth: Truth, place: Path, deadline: float) -> None:
        self._fleet, self._truth, self._place, self._deadline = fleet, truth, place, deadline
        self._transport = self._meddling("auto")

    async def begin(self) -> None:
        self._fleet._versions.transport = self._transport
        for name in self._fleet.engines:
            await self._slow_down(name)
        await self._truth.check()

    async def close(self) -> None:
        """The fleet closes the transport that it was opened with."""
        await self._transport.close()

    async def take(self, step: Step) -> None:
        """One step, with generations under way, and what must hold after it."""
        print(f"{time.monotonic():.1f} {step}")
        before = self._truth.published
        background = await self._generating(self._deadline if isinstance(step, Hang) else PATIENCE)
        try:
            expected = await self._happen(step)
        finally:
            made = await asyncio.gather(*background.values(), return_exceptions=True)
        self._truth.now(expected)
        await self._truth.check()
        for prompt, one in zip(background, made, strict=True):
            if isinstance(one, Generation):
                print("  ", [(span.version, span.end) for span in one.version_spans])
                await self._truth.check_generation(prompt, one, {before, self._truth.published})
            else:
                assert isinstance(one, EngineError | NoEngineError), one
                assert self._may_fail(step), one

    def _may_fail(self, step: Step) -> bool:
        """Whether a step may cost requests that are under way."""
        if isinstance(step, Publish | Travel):
            return False
        return not isinstance(step, Bad) or not (self._truth.steps_back or step.fault in HARMLESS)

    # What happens. Each returns how the engines may stand afterwards

    async def _happen(self, step: Step) -> Fates:
        match step:
            case Publish():
                failed = await self._publish()
                assert failed == (set() if self._truth.usable else None)
                return self._truth.served(set())
            case Bad(fault):
                return await self._bad(fault)
            case Spoil(engine):
                return await self._spoil(self._to_restart(engine))
            case Restart(engine):
                return await self._restart(self._to_restart(engine))
            case Travel(transport):
                return await self._travel(transport)
        usable = self._truth.usable
        if not usable:
            return self._truth.unchanged()
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
        """Of those that are out, if any is."""
        names = [name for name, found in self._truth.fates.items() if found is Fate.OUT] or list(self._truth.fates)
        return names[engine % len(names)]

    async def _publish(
        self, happens: Callable[[], object] = lambda: None, deadline: float = PATIENCE
    ) -> set[str] | None:
        """Other weights than those that serve, under the next number, be it the same as in an attempt before. Returns
        who did not take them; None: nobody did."""
        variant, version = self._truth.next_variant(), self._truth.published + 1
        source = Source(self._truth.variants[variant].tensors, happens)
        try:
            async with asyncio.timeout(deadline + ROLLBACK_DEADLINE + 5.0):
                report = await self._fleet.publish(source, version, bucket_bytes=BUCKET, deadline=deadline)
        except (PublishError, NoEngineError) as error:
            print("  ", error)
            return None
        print("  ", report.failed)
        assert report.unstored is None
        self._truth.took(version, variant)
        return set(report.failed)

    async def _bad(self, fault: Fault) -> Fates:
        if fault == "again":
            loop = asyncio.get_running_loop()

            def again() -> None:
                with pytest.raises(PublishError, match="another version is being published"):
                    asyncio.run_coroutine_threadsafe(self._fleet.publish([], self._truth.published + 2), loop).result(
                        PATIENCE
                    )

            assert await self._publish(again) == (set() if self._truth.usable else None)
            return self._truth.served(set())
        tensors = damaged(self._truth.variants[self._truth.next_variant()].tensors, fault)
        version = self._truth.published + (fault != "older")

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
        with pytest.raises(raised if self._truth.usable else (NoEngineError, PublishError)) as caught:
            await task
        print("  ", repr(caught.value))
        return self._truth.unchanged() if fault in HARMLESS else self._truth.given_up()

    async def _kill(self, name: str, midway: bool) -> Fates:
        if not midway:
            strike(self._fleet, name)
            await until(lambda: not self._fleet.snapshot.get(name).usable)
            return self._truth.unchanged() | {name: {Fate.OUT}}
        failed = await self._publish(lambda: strike(self._fleet, name))
        assert failed == ({name} if self._truth.others(name) else None)
        await until(lambda: not self._fleet.snapshot.get(name).usable)  # a publish that nobody took distrusts nobody
        return self._truth.served({name})

    async def _hang(self, name: str, resumes: bool) -> Fates:
        """One that is alone goes on in any case: nobody has to find out that it hangs before a request does."""
        others, version = self._truth.others(name), self._truth.published + 1

        async def resume() -> None:
            await until(lambda: all(self._fleet.snapshot.get(other).version == version for other in others))
            strike(self._fleet, name, signal.SIGCONT)

        stop = lambda: strike(self._fleet, name, signal.SIGSTOP)  # noqa: E731
        if others and resumes:
            failed, _ = await asyncio.gather(self._publish(stop, self._deadline), resume())
        else:
            failed = await self._publish(stop, self._deadline)
        if not others:
            strike(self._fleet, name, signal.SIGCONT)
            assert failed is None
            await until(lambda: self._fleet.snapshot.get(name).phase is not Phase.SUSPECT)
            return self._truth.unchanged() | {name: {Fate.OUT, self._truth.fates[name]}}
        assert failed == {name}
        return self._truth.served({name})

    async def _corrupt(self, name: str | None) -> Fates:
        """Where the engines can't be compared with what was sent, but are compared with each other, nobody can tell
        which is wrong; and what is wrong in all of them, or in the only one, is not found, and not tried here."""
        if not self._truth.attests and (name is None or len(self._truth.usable) == 1):
            return self._truth.unchanged()
        self._transport.damage = Damage(name, whole=not self._truth.steps_back)
        failed = await self._publish()
        assert self._transport.done
        if self._truth.steps_back:
            assert failed == ({name} if name is not None and self._truth.others(name) else None)
            return self._truth.served({name}) if failed and name else self._truth.unchanged()
        if failed is None:
            return self._truth.given_up() | {one: {Fate.EMPTY} for one in self._truth.usable}
        assert name in failed
        return self._truth.served(failed) | {one: {Fate.EMPTY, Fate.OUT} for one in failed}

    async def _refuse(self, name: str) -> Fates:
        engine = self._fleet.engines[name]
        if not isinstance(engine, EmbeddedEngine):
            return self._truth.unchanged()
        await engine.inject_fault("refuse_update", count=1)
        failed = await self._publish()
        assert failed == ({name} if self._truth.others(name) else None)
        return self._truth.served({name}) if failed else self._truth.unchanged()

    async def _spoil(self, name: str) -> Fates:
        if not self._truth.published or self._truth.spoiled:
            return self._truth.unchanged()
        assert await self._fleet._versions.secured() is None
        spoil_folder(
            self._place / "versions" / f"version-{self._truth.published:08d}", Damage(None, not self._truth.steps_back)
        )
        self._truth.spoiled = True
        return await self._restart(name)

    async def _restart(self, name: str) -> Fates:
        if self._truth.spoiled:
            with pytest.raises(PublishError):
                await self._fleet.restart(name, bucket_bytes=BUCKET)
        else:
            await self._fleet.restart(name, bucket_bytes=BUCKET)
        await self._slow_down(name)
        return self._truth.unchanged() | {name: {Fate.EMPTY if self._truth.spoiled else Fate.SERVING}}

    async def _travel(self, name: TransportName) -> Fates:
        before, self._transport = self._transport, self._meddling(name)
        self._fleet._versions.transport = self._transport
        await before.close()
        return self._truth.unchanged()

    # Means

    def _meddling(self, name: TransportName) -> MeddlingTransport:
        inner = transport_for(name, list(self._fleet.replicas.by_name.values()), self._fleet._versions.store)
        assert inner is not None
        return MeddlingTransport(inner, self._place)

    async def _generating(self, deadline: float) -> dict[Prompt, "asyncio.Task[Generation]"]:
        """Long generations, the first of which has begun."""
        serving = [self._fleet.engines[name] for name, found in self._truth.fates.items() if found is Fate.SERVING]
        if not serving:
            return {}
        requests = [greedy_request(prompt, self._truth.name(), LONG) for prompt in PROMPTS]
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
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)
