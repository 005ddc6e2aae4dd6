"""A publish: one transaction on each engine, which brings it a weight version. Begin, load, attest, commit.

The engines advance independently. An engine that fails is rolled back if possible, and the report names it. It must not
serve until it holds a whole version. A bucket is overwritten only after every engine has loaded it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
from millrace.tracing import add_span, span
from millrace.types import Capability
from millrace.weights.audit import Samples, audited
from millrace.weights.fingerprint import Fingerprint
from millrace.weights.plan import buckets
from millrace.weights.report import PublishReport
from millrace.weights.sent import Sent, require_same
from millrace.weights.source import WeightSource
from millrace.weights.step import take_step
from millrace.weights.transports.base import (
    ExchangedBucket,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    Transport,
)
from millrace.weights.update import Update

STEP_SHARE = 0.5  # of the time that is left for the whole transaction
ROLLBACK_DEADLINE = 10.0  # seconds


class Outcome(StrEnum):
    """The state that a publish leaves an engine in. An engine without an outcome holds the version that it had."""

    COMMITTED = "committed"  # it holds the version
    EMPTY = "empty"  # it is healthy, and holds no version
    UNTRUSTED = "untrusted"  # its weights are unknown


OnOutcome = Callable[[str, Outcome, EngineError | None], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A staged bucket, the seconds that staging it took, and an error for each engine that it did not reach."""

    staged: StagedBucket
    seconds: float
    unreached: Mapping[str, EngineError]


Step = Callable[[Update], Awaitable[None]]


class Publish:
    """One publish: sends the tensors of `source` to every target as `version`.

    Before the commit, each engine's weights are compared with the tensors that were sent, by full or sampled checksums
    if the engine can compute them. Engines with the same layout must hold the same weights.

    An engine fails if it is not done within `deadline` seconds, or if one step takes half of the time that is left: the
    other engines need the rest. Engines that failed only because another engine broke their broadcast get the version
    in a second pass, if the source can be iterated again. The first pass sets `fingerprint`. If a later pass gives
    other tensors, no engine commits and WeightsChanged is raised.

    With `samples`, which the source fills, each engine's layers are audited before the commit (`weights/audit.py`).

    `on_outcome` is called with an engine's name, its outcome and its error. COMMITTED is reported as soon as the engine
    has committed. The other outcomes are reported if the engine's old weights could not be restored, or if other
    engines took the version and it did not. It may be called again with a worse outcome. Reported outcomes stay true if
    `run` raises.

        source = source_of(model.state_dict().items())
        publish = Publish(targets, source, 7, transport, bucket_bytes=2**28, deadline=60.0)
        report = await publish.run()
    """

    def __init__(
        self,
        targets: Sequence[PublishTarget],
        source: WeightSource,
        version: int,
        transport: Transport,
        *,
        bucket_bytes: int,
        deadline: float,
        on_outcome: OnOutcome | None = None,
        fingerprint: Fingerprint | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.version = version
        self.nbytes, self.stage_seconds = 0, 0.0
        self._updates = [Update(target) for target in targets]
        self._source, self._transport, self._bucket_bytes = source, transport, bucket_bytes
        self._deadline, self._on_outcome, self._fingerprint = deadline, on_outcome, fingerprint
        self._audit_samples = samples
        self._started = time.monotonic()
        self._ends = self._started + deadline
        self._sent = Sent()  # in this pass
        self._exchanged: int | None = None

    @property
    def record(self) -> Mapping[str, str] | None:
        """The checksum of each tensor that was sent, by name; None if the transport reads no bytes."""
        return self._sent.record

    async def run(self) -> PublishReport:
        """Publish, and return the report. Raises PublishError if no engine took the version, and EnginesLost if the
        reason is that none could be reached."""
        try:
            async with asyncio.timeout(self._deadline):
                await self._run_passes()
        except TimeoutError:
            for update in self._updates:
                if not update.committed:
                    late = f"it did not take version {self.version} within {round(self._deadline, 2):g} s"
                    update.error = update.error or EngineTimeout(update.engine.name, late)
        finally:
            # No transaction stays open, even if the source of tensors raised or the caller was cancelled.
            await asyncio.shield(asyncio.gather(*map(self._abandon, self._updates)))
        self._require_success()
        for update in self._updates:
            await self._report_failure(update)
        return PublishReport(
            self.version,
            self.nbytes,
            time.monotonic() - self._started,
            self.stage_seconds,
            tuple(update.report() for update in self._updates),
            exchanged=self._exchanged,
        )

    async def _run_passes(self) -> None:
        pending: Sequence[Update] = self._updates
        while pending and await self._reach(pending):
            await self._load(pending)
            if self._fingerprint is not None and any(update.error is None for update in pending):
                self._fingerprint.require(self._sent.samples)
            await self._attest(pending)
            await self._each(pending, "attest", self._audit)
            await self._each(pending, "commit", self._commit)
            pending = [update for update in pending if update.blameless]
            restored = await asyncio.gather(*map(self._abandon, pending))
            pending = [update for update, healthy in zip(pending, restored, strict=True) if healthy]
            for update in pending:
                update.collateral = True
            if self._source.once:
                return
            for update in pending:
                update.error, update.blameless = None, False

    def _require_success(self) -> None:
        errors = [update.error for update in self._updates if update.error is not None]
        if len(errors) < len(self._updates):
            return
        message = f"no engine took version {self.version}: {'; '.join(map(str, errors))}"
        lost = [error for error in errors if isinstance(error, EngineUnreachable)]
        raise EnginesLost(message, lost) if len(lost) == len(errors) else PublishError(message)

    async def _report_failure(self, update: Update) -> None:
        """Report the outcome of an engine that did not take the version, although other engines did."""
        error = update.error
        if error is None or (update.emptied and isinstance(error, EngineRefused)):
            return
        empty = update.collateral or isinstance(error, LocalError)
        await self._report(update, Outcome.EMPTY if empty else Outcome.UNTRUSTED, error)

    async def _report(self, update: Update, outcome: Outcome, error: EngineError | None = None) -> None:
        if self._on_outcome is not None:
            await self._on_outcome(update.engine.name, outcome, error)

    async def _reach(self, updates: Sequence[Update]) -> bool:
        """Check which engines accept these tensors and can be reached, before any transaction begins. Return whether
        any engine is left."""
        shapes = self._source.shapes()
        if shapes is not None:
            await self._each(updates, "check", lambda u: u.engine.check_tensors(shapes))
        targets = [update.target for update in updates if update.error is None]
        unreached = await self._transport.open(targets, self.version, deadline=self._share()) if targets else {}
        for update in updates:
            update.error = update.error or unreached.get(update.engine.name)
        return any(update.error is None for update in updates)

    def _grouped(self) -> Iterator[NamedTensors]:
        """Yield the tensors of each bucket. If all exist already, they are grouped before the engines pause."""
        found: Iterator[NamedTensors] = buckets(self._source, self._bucket_bytes)
        yield from list(found) if self._source.at_hand else found

    async def _load(self, updates: Sequence[Update]) -> None:
        """Send the buckets. The transactions begin when the first bucket is ready, because some engines stop generating
        then.

        While the engines load a bucket, the next one is staged and delivered. If the transport allows it, the request
        to load that is sent too, so that the engines need not wait for it. There are two slots, so the bucket after it
        is staged when all engines have loaded the first.
        """
        self._sent, running = Sent(), list[asyncio.Task[None]]()
        sampling = self._fingerprint is not None or any(u.target.can(Capability.SAMPLED_CHECKSUMS) for u in updates)
        source = self._sent.staged(self._grouped(), self._transport, sampling=sampling)
        arrival = await self._next_bucket(source, updates)
        _leave_out(updates, arrival)
        await self._each(updates, "begin", self._begin)
        nbytes = 0
        try:
            while arrival is not None and any(update.error is None for update in updates):
                self.stage_seconds += arrival.seconds
                nbytes += arrival.staged.nbytes
                self._sent.add(arrival.staged)
                if isinstance(arrival.staged, ExchangedBucket):
                    self._exchanged = (self._exchanged or 0) + arrival.staged.exchanged
                if not self._transport.loads_ahead:
                    await _until(running, 0)
                running.append(asyncio.create_task(self._load_bucket(updates, arrival.staged)))
                await _until(running, 1)
                arrival = await self._next_bucket(source, updates)
                _leave_out(updates, arrival)
            await _until(running, 0)
        except asyncio.CancelledError:
            for task in running:
                task.cancel()
            raise
        finally:
            # No engine may load while its transaction is rolled back, or while its slot is freed.
            await asyncio.gather(*running, return_exceptions=True)
        self.nbytes = max(self.nbytes, nbytes)
        for update in updates:
            if update.loading_since is not None:
                add_span("load", update.loading_since, update.legs["load"], {"millrace.engine": update.engine.name})

    async def _next_bucket(self, source: Iterator[StagedBucket], updates: Sequence[Update]) -> _Arrival | None:
        started = time.monotonic()
        if (staged := await _next_of(source)) is None:
            return None
        targets = [update.target for update in updates if update.error is None]
        unreached = await self._transport.deliver(targets, deadline=self._share())
        return _Arrival(staged, time.monotonic() - started, unreached)

    async def _load_bucket(self, updates: Sequence[Update], staged: StagedBucket) -> None:
        loading = [update for update in updates if update.error is None]
        targets = [update.target for update in loading]
        began = time.monotonic()
        results = await self._transport.load(targets, staged, deadline=self._share())
        for update in loading:
            update.take("load", results[update.engine.name])
            update.loading_since = update.loading_since or began
            update.legs["load"] = time.monotonic() - update.loading_since

    async def _begin(self, update: Update) -> None:
        if not update.target.can(Capability.STAGED_UPDATE):
            update.paused_at = update.paused_at or time.monotonic()
        update.begun = True  # even if the answer is lost
        try:
            await update.engine.begin_update(self.version)
        except EngineRefused:
            update.begun = False
            raise

    async def _attest(self, updates: Sequence[Update]) -> None:
        """Compare the engines' weights with the tensors that were sent, and with engines of the same layout."""
        reported: dict[str, Mapping[str, str]] = {}
        layouts = Counter(update.layout for update in updates if update.error is None)

        async def ask(update: Update) -> None:
            engine, target = update.engine, update.target
            if target.can(Capability.CHECKSUMS) and self.record is not None:
                require_same(engine.name, await engine.checksums(), self.record)
                return
            if target.can(Capability.SAMPLED_CHECKSUMS) and (samples := await engine.sampled_checksums()):
                require_same(engine.name, samples, self._sent.samples)
            if target.can(Capability.OWN_CHECKSUMS) and layouts[update.layout] > 1:
                reported[engine.name] = await engine.checksums()

        await self._each(updates, "attest", ask)
        first: dict[object, Update] = {}
        for update in updates:
            if update.error is None and update.engine.name in reported:
                other = first.setdefault(update.layout, update)
                if reported[update.engine.name] != reported[other.engine.name]:  # either of the two may be wrong
                    for wrong, peer in ((update, other), (other, update)):
                        wrong.error = EngineFailed(wrong.engine.name, f"it holds other weights than {peer.engine.name}")

    async def _audit(self, update: Update) -> None:
        """Compare the layers with the trainer's weights. Raises EngineFailed if they are not what was asked for."""
        samples = self._audit_samples.all() if self._audit_samples is not None else ()
        update.audit = await audited(update.engine, update.target.info, samples, deadline=self._share())
        if update.audit is not None and update.audit.fault is not None:
            raise EngineFailed(update.engine.name, update.audit.fault)

    async def _commit(self, update: Update) -> None:
        await update.engine.commit()
        update.begun, update.committed = False, True
        if update.paused_at is not None:
            update.legs["pause"] = time.monotonic() - update.paused_at
        await self._report(update, Outcome.COMMITTED)

    async def _abandon(self, update: Update) -> bool:
        """Roll back a transaction that was not committed. Return whether the engine is healthy. An engine that refuses,
        because it can't restore its old weights, is healthy."""
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
            await self._report(update, Outcome.EMPTY if empty else Outcome.UNTRUSTED, failed)
            return refused
        return True

    async def _each(self, updates: Sequence[Update], leg: str, step: Step) -> None:
        """Take one step on every engine that has not failed. An engine's error ends only its own transaction."""

        async def guarded(update: Update) -> None:
            with span(leg, {"millrace.engine": update.engine.name}):
                update.take(leg, await take_step(update.engine.name, leg, step(update), self._share()))

        async with asyncio.TaskGroup() as group:
            for update in updates:
                if update.error is None:
                    group.create_task(guarded(update))

    def _share(self) -> float:
        """Return the seconds that one step on one engine may take."""
        return max(self._ends - time.monotonic(), 0.0) * STEP_SHARE


async def _until(running: list[asyncio.Task[None]], left: int) -> None:
    """Wait for the first of the loads that run, and forget them, until only so many are left."""
    while len(running) > left:
        await running[0]
        del running[0]


async def _next_of(source: Iterator[StagedBucket]) -> StagedBucket | None:
    """Return the next bucket, staged in a thread; None after the last one."""
    staging = asyncio.create_task(asyncio.to_thread(next, source, None))
    try:
        return await asyncio.shield(staging)
    except asyncio.CancelledError:
        await asyncio.wait([staging])  # the thread writes to a slot, and must end before the next publish
        raise


def _leave_out(updates: Sequence[Update], arrival: _Arrival | None) -> None:
    """Fail the engines whose host the bucket did not reach."""
    unreached = arrival.unreached if arrival is not None else {}
    for update in updates:
        if update.error is None and (error := unreached.get(update.engine.name)) is not None:
            update.error, update.collateral = error, True
