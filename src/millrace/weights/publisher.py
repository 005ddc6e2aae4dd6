"""A publish: a transaction on each engine that brings it a weight version. Begin, load, attest, commit.

The engines advance independently. An engine that fails is rolled back if it can be, and named in the report. It must
not serve until it holds a whole version. No part of a bucket is overwritten before every engine has loaded it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.errors import (
    EngineError,
    EngineFailed,
    EngineRefused,
    EnginesLost,
    EngineTimeout,
    EngineUnreachable,
    LocalError,
    PublishError,
)
from millrace.types import Capability
from millrace.weights.fingerprint import Fingerprint, sampled
from millrace.weights.plan import announced, buckets
from millrace.weights.report import EngineReport, PublishReport
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport

if TYPE_CHECKING:
    import torch

STEP_SHARE = 0.5  # of the time that is left for the whole transaction
ROLLBACK_DEADLINE = 10.0  # seconds


class Outcome(StrEnum):
    """The state that a publish leaves an engine in. An engine without an outcome holds what it held before."""

    COMMITTED = "committed"  # it holds the version
    EMPTY = "empty"  # it is healthy, and holds no version
    UNTRUSTED = "untrusted"  # it may hold anything


OnOutcome = Callable[[str, Outcome, EngineError | None], Awaitable[None]]


@dataclass(slots=True)
class _Update:
    """One engine's transaction."""

    target: PublishTarget
    error: EngineError | None = None
    begun: bool = False
    committed: bool = False
    emptied: bool = False
    failed_at: float = 0.0
    collateral: bool = False
    paused_at: float | None = None
    legs: dict[str, float] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.target.engine

    @property
    def layout(self) -> tuple[str, str, int]:
        """Engines with the same value lay out their tensors in the same way."""
        info = self.target.info
        return info.kind, info.engine_version, info.ranks

    def report(self) -> EngineReport:
        return EngineReport(
            engine=self.engine.name,
            error=self.error,
            collateral=self.collateral,
            begin_seconds=self.legs.get("begin", 0.0),
            load_seconds=self.legs.get("load", 0.0),
            attest_seconds=self.legs.get("attest", 0.0),
            commit_seconds=self.legs.get("commit", 0.0),
            pause_seconds=self.legs.get("pause", 0.0),
        )


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A staged bucket, the seconds that staging took, and why it did not reach some engines."""

    staged: StagedBucket
    seconds: float
    unreached: Mapping[str, EngineError]


Step = Callable[[_Update], Awaitable[None]]


class Publish:
    """Brings `tensors` to every target as `version`, and verifies it by checksums before it is committed: those of the
    tensors that were sent, all or sampled, if the engine can name them. Engines of the same layout must hold the same.

    `on_outcome` is called with an engine's name, its outcome and its error: COMMITTED as soon as it has committed, and
    the others when the engine could not be brought back to what it served before, or when other engines took the
    version and it did not. It may be called again with a worse outcome. What was reported is true also if `run` raises.

    An engine that is not done after `deadline` seconds has failed, and so has an engine that takes half of the time
    that is left for one step: the others need the rest. Engines that failed because of another (in one broadcast, which
    one of them broke off) get the version in a second pass, if `tensors` can be iterated again. The first pass sets
    `fingerprint`. If a later pass gives other tensors, no engine commits and WeightsChanged is raised.
    """

    def __init__(
        self,
        targets: Sequence[PublishTarget],
        tensors: Iterable[tuple[str, "torch.Tensor"]],
        version: int,
        transport: Transport,
        *,
        bucket_bytes: int,
        deadline: float,
        on_outcome: OnOutcome | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.version = version
        self.nbytes, self.stage_seconds = 0, 0.0
        self._updates = [_Update(target) for target in targets]
        self._tensors, self._transport, self._bucket_bytes = tensors, transport, bucket_bytes
        self._deadline, self._on_outcome, self._fingerprint = deadline, on_outcome, fingerprint
        self._started = time.monotonic()
        self._ends = self._started + deadline
        self._sent: dict[str, str] = {}  # each tensor's checksum in this pass, empty if the transport reads no bytes
        self._samples: dict[str, str] = {}  # each tensor's sampled checksum in this pass

    async def run(self) -> PublishReport:
        """Publish. Raises PublishError if no engine took the version, and EnginesLost if all of them broke off."""
        try:
            async with asyncio.timeout(self._deadline):
                await self._run_passes()
        except TimeoutError:
            for update in self._updates:
                if not update.committed:
                    late = f"it did not take version {self.version} within {self._deadline:g} s"
                    update.error = update.error or EngineTimeout(update.engine.name, late)
        finally:
            # Also if the source of tensors raised or the caller was cancelled: no transaction is left open.
            await asyncio.shield(asyncio.gather(*map(self._abandon, self._updates)))
        self._require_success()
        for update in self._updates:
            await self._report_failure(update)
        reports = tuple(update.report() for update in self._updates)
        return PublishReport(self.version, self.nbytes, time.monotonic() - self._started, self.stage_seconds, reports)

    async def _run_passes(self) -> None:
        left: Sequence[_Update] = self._updates
        while left and await self._reach(left):
            await self._load(left)
            if self._fingerprint is not None and any(update.error is None for update in left):
                self._fingerprint.require(self._samples)
            await self._attest(left)
            await self._each(left, "commit", self._commit)
            left = await self._bystanders(left)
            restored = await asyncio.gather(*map(self._abandon, left))
            left = [update for update, sound in zip(left, restored, strict=True) if sound]
            for update in left:
                update.collateral = True
            if isinstance(self._tensors, Iterator):
                return
            for update in left:
                update.error, update.failed_at = None, 0.0

    def _require_success(self) -> None:
        errors = [update.error for update in self._updates if update.error is not None]
        if len(errors) < len(self._updates):
            return
        message = f"no engine took version {self.version}: {'; '.join(map(str, errors))}"
        lost = [error for error in errors if isinstance(error, EngineUnreachable)]
        raise EnginesLost(message, lost) if len(lost) == len(errors) else PublishError(message)

    async def _report_failure(self, update: _Update) -> None:
        """Report an engine that did not take the version, while others did."""
        error = update.error
        if error is None or (update.emptied and isinstance(error, EngineRefused)):
            return
        empty = update.collateral or isinstance(error, LocalError)
        await self._tell(update, Outcome.EMPTY if empty else Outcome.UNTRUSTED, error)

    async def _tell(self, update: _Update, outcome: Outcome, error: EngineError | None = None) -> None:
        if self._on_outcome is not None:
            await self._on_outcome(update.engine.name, outcome, error)

    async def _reach(self, updates: Sequence[_Update]) -> bool:
        """Find out, before anything begins, which engines can't take these tensors or can't be reached. Return whether
        any engine is left."""
        shapes = announced(self._tensors)
        if shapes is not None:
            await self._each(updates, "check", lambda u: u.engine.check_tensors(shapes))
        targets = [update.target for update in updates if update.error is None]
        unreached = await self._transport.open(targets, self.version, deadline=self._share()) if targets else {}
        for update in updates:
            update.error = update.error or unreached.get(update.engine.name)
        return any(update.error is None for update in updates)

    def _buckets(self, updates: Sequence[_Update]) -> Iterator[StagedBucket]:
        self._sent, self._samples = {}, {}
        source: Iterator[NamedTensors] = buckets(self._tensors, self._bucket_bytes)
        if self._fingerprint is not None or any(u.target.can(Capability.SAMPLED_CHECKSUMS) for u in updates):
            source = sampled(source, self._samples)
        return self._transport.staged(source)

    async def _load(self, updates: Sequence[_Update]) -> None:
        """Stream the buckets: one is staged, and delivered, while the engines load the other. The transactions begin
        when the first bucket is ready, since some engines generate nothing from then on."""
        source, nbytes = self._buckets(updates), 0
        arrival = await self._next_bucket(source, updates)
        _leave_out(updates, arrival)
        await self._each(updates, "begin", self._interrupting(self._begin))
        while arrival is not None and any(update.error is None for update in updates):
            staged = arrival.staged
            self.stage_seconds += arrival.seconds
            nbytes += staged.nbytes
            self._record(staged)
            following = asyncio.create_task(self._next_bucket(source, updates))
            try:
                await asyncio.gather(self._each(updates, "load", self._loading(staged)), self._transport.send(staged))
            except BaseException:
                following.cancel()
                # Its thread writes into a slot, which must not be freed meanwhile.
                await asyncio.gather(following, return_exceptions=True)
                raise
            arrival = await following
            _leave_out(updates, arrival)
        self.nbytes = max(self.nbytes, nbytes)

    def _record(self, staged: StagedBucket) -> None:
        """Remember the checksums of the tensors in a bucket. Raises PublishError for a tensor that comes twice."""
        again = {name for name, count in Counter(staged.names).items() if count > 1}
        if twice := sorted(again | (self._sent.keys() & set(staged.names))):
            raise PublishError(f"the trainer named a tensor twice: {twice[0]}")
        self._sent |= {name: staged.checksums.get(name, "") for name in staged.names}

    async def _next_bucket(self, source: Iterator[StagedBucket], updates: Sequence[_Update]) -> _Arrival | None:
        started = time.monotonic()
        if (staged := await _next_of(source)) is None:
            return None
        sound = [update.target for update in updates if update.error is None]
        unreached = await self._transport.deliver(sound, deadline=self._share())
        return _Arrival(staged, time.monotonic() - started, unreached)

    def _loading(self, staged: StagedBucket) -> Step:
        async def load(update: _Update) -> None:
            if reason := self._transport.broken(update.engine):
                raise EngineFailed(update.engine.name, reason)
            await update.engine.load(staged.bucket_for(update.target), deadline=self._share())

        return self._interrupting(load)

    def _interrupting(self, step: Step) -> Step:
        """Return the step, after whose failure no other engine waits for a broadcast with this one."""

        async def run(update: _Update) -> None:
            try:
                await step(update)
            except BaseException:
                self._transport.interrupt(update.engine)
                raise

        return run

    async def _bystanders(self, updates: Sequence[_Update]) -> list[_Update]:
        """Return the updates that failed because others broke the broadcast off."""
        failed = sorted((u for u in updates if u.error is not None and u.failed_at), key=lambda u: u.failed_at)
        collateral = await self._transport.collateral([update.engine for update in failed])
        return [update for update in failed if update.engine.name in collateral]

    async def _begin(self, update: _Update) -> None:
        if not update.target.can(Capability.STAGED_UPDATE):
            update.paused_at = update.paused_at or time.monotonic()
        update.begun = True  # also if the answer is lost
        try:
            await update.engine.begin_update(self.version)
        except EngineRefused:
            update.begun = False
            raise

    async def _attest(self, updates: Sequence[_Update]) -> None:
        """Compare what the engines hold with what was sent, and among engines of the same layout."""
        held: dict[str, Mapping[str, str]] = {}
        layouts = Counter(update.layout for update in updates if update.error is None)

        async def ask(update: _Update) -> None:
            engine, target = update.engine, update.target
            if target.can(Capability.CHECKSUMS) and all(self._sent.values()):
                _require_same(engine.name, await engine.checksums(), self._sent)
                return
            if target.can(Capability.SAMPLED_CHECKSUMS):
                _require_same(engine.name, await engine.sampled_checksums(), self._samples)
            if target.can(Capability.OWN_CHECKSUMS) and layouts[update.layout] > 1:
                held[engine.name] = await engine.checksums()

        await self._each(updates, "attest", ask)
        first: dict[object, _Update] = {}
        for update in updates:
            if update.error is None and update.engine.name in held:
                other = first.setdefault(update.layout, update)
                if held[update.engine.name] != held[other.engine.name]:  # either of the two may be wrong
                    for one, two in ((update, other), (other, update)):
                        one.error = EngineFailed(one.engine.name, f"it holds other weights than {two.engine.name}")

    async def _commit(self, update: _Update) -> None:
        await update.engine.commit()
        update.begun, update.committed = False, True
        if update.paused_at is not None:
            update.legs["pause"] = time.monotonic() - update.paused_at
        await self._tell(update, Outcome.COMMITTED)

    async def _abandon(self, update: _Update) -> bool:
        """Roll back a transaction that was not committed. Return whether the engine is healthy: an engine that only
        can't restore its old weights is."""
        if not update.begun:
            return True
        update.begun = False
        try:
            async with asyncio.timeout(ROLLBACK_DEADLINE):
                await update.engine.rollback()
        except (EngineError, TimeoutError) as error:
            name = update.engine.name
            failed = error if isinstance(error, EngineError) else EngineTimeout(name, "it did not roll the update back")
            update.error = update.error or failed
            update.emptied = refused = isinstance(failed, EngineRefused)
            empty = refused or isinstance(failed, LocalError)
            await self._tell(update, Outcome.EMPTY if empty else Outcome.UNTRUSTED, failed)
            return refused
        return True

    async def _each(self, updates: Sequence[_Update], leg: str, step: Step) -> None:
        """Take one step on every engine that has not failed. An engine's error ends only its own transaction."""

        async def guarded(update: _Update) -> None:
            begun, share = time.monotonic(), self._share()
            try:
                async with asyncio.timeout(share):
                    await step(update)
            except EngineError as error:
                update.error, update.failed_at = error, time.monotonic()
            except TimeoutError:
                late = f"it was not done with {leg} after {share:.1f} s, half of what was left"
                update.error, update.failed_at = EngineTimeout(update.engine.name, late), time.monotonic()
            update.legs[leg] = update.legs.get(leg, 0.0) + time.monotonic() - begun

        async with asyncio.TaskGroup() as group:
            for update in updates:
                if update.error is None:
                    group.create_task(guarded(update))

    def _share(self) -> float:
        """Return the seconds that one step on one engine may take."""
        return max(self._ends - time.monotonic(), 0.0) * STEP_SHARE


async def _next_of(source: Iterator[StagedBucket]) -> StagedBucket | None:
    """Return the next bucket, which a thread stages."""
    staging = asyncio.create_task(asyncio.to_thread(next, source, None))
    try:
        return await asyncio.shield(staging)
    except asyncio.CancelledError:
        await asyncio.wait([staging])  # the thread writes into a slot, and must be done before the next publish
        raise


def _leave_out(updates: Sequence[_Update], arrival: _Arrival | None) -> None:
    """Fail the engines whose host the bucket did not reach."""
    unreached = arrival.unreached if arrival is not None else {}
    for update in updates:
        if update.error is None and (error := unreached.get(update.engine.name)) is not None:
            update.error, update.collateral = error, True


def _require_same(engine: str, held: Mapping[str, str], sent: Mapping[str, str]) -> None:
    if missing := sent.keys() ^ held.keys():
        raise EngineFailed(engine, f"tensors that only one side has: {', '.join(sorted(missing)[:3])}")
    if wrong := [name for name, value in sent.items() if held[name] != value]:
        raise EngineFailed(engine, f"{len(wrong)} of {len(sent)} tensors are not what was sent, {wrong[0]} among them")
