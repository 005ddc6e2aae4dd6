"""A weight version's way into the engines, as a transaction on each: begin, load, attest, commit.

The engines go on independently. One that fails is rolled back where it can be and named in the report; it must not
serve until it holds a whole version. Nothing of a bucket is overwritten before every engine has loaded it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millrace.engines.base import Engine
from millrace.errors import (
    EngineError,
    EngineFailed,
    EngineRefused,
    EnginesLost,
    EngineTimeout,
    EngineUnreachable,
    PublishError,
)
from millrace.types import Capability
from millrace.weights.fingerprint import Fingerprint, sampled
from millrace.weights.plan import announced, buckets
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport

if TYPE_CHECKING:
    import torch


STEP_SHARE = 0.5  # of what is left of the whole transaction's time
ROLLBACK_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How one engine fared. `collateral`: it was not the engine that failed, but another in the same broadcast, or who
    brings its host the weights. Seconds of each leg; `pause_seconds` is how long it generated nothing because of the
    update."""

    engine: str
    error: EngineError | None
    collateral: bool
    begin_seconds: float
    load_seconds: float
    attest_seconds: float
    commit_seconds: float
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What a publish did. `stage_seconds`: copying into buckets and bringing these to the engines' hosts, most of it
    hidden behind the engines' loading.
    `unstored`: why this version, or the one before, is not kept. `left_out`: the engines that nothing was sent to,
    since they were out of rotation for good, and why."""

    version: int
    nbytes: int
    seconds: float
    stage_seconds: float
    engines: tuple[EngineReport, ...]
    unstored: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, EngineError]:
        return {report.engine: report.error for report in self.engines if report.error is not None}


@dataclass(slots=True)
class _Update:
    """One engine's transaction while it is under way."""

    target: PublishTarget
    error: EngineError | None = None
    begun: bool = False
    committed: bool = False
    failed_at: float = 0.0
    collateral: bool = False
    paused_at: float | None = None
    legs: dict[str, float] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.target.engine


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A bucket that was staged, and why which engines can't get it. `seconds` that this took."""

    staged: StagedBucket
    seconds: float
    unreached: Mapping[str, EngineError]


Step = Callable[[_Update], Awaitable[None]]


async def publish(
    targets: Sequence[PublishTarget],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    version: int,
    transport: Transport,
    *,
    bucket_bytes: int,
    deadline: float,
    committed: Callable[[str], Awaitable[None]],
    unrestored: Callable[[str, EngineError], Awaitable[None]],
    fingerprint: Fingerprint | None = None,
) -> PublishReport:
    """Brings `tensors` as `version` into every target, and proves it by checksums before it is committed: those of
    what was sent where an engine can name them, all or sampled; and engines alike must hold the same.

    `committed` is called with an engine's name as soon as that engine has committed, `unrestored` when one could not be
    brought back to what it served before; both are true also when this raises later on. An engine that is not done
    after `deadline` seconds has failed, and so has one that takes half of what is left of them for one step: the others
    need the rest. Those that failed because of another (where all get the weights by one broadcast, and one engine
    breaks it off) get them again, if `tensors` can be iterated again (an iterator can't). The first
    pass sets `fingerprint`; if a later pass gives other tensors, no engine commits and WeightsChanged is raised.
    Raises PublishError when no engine took the version, and EnginesLost where all of them broke off.
    """
    started = time.monotonic()
    ends = started + deadline
    updates = [_Update(target) for target in targets]
    nbytes, stage_seconds = 0, 0.0
    try:
        async with asyncio.timeout(deadline):
            left: Sequence[_Update] = updates
            while left and await _reach(left, tensors, version, transport, ends):
                samples = dict[str, str]()
                source: Iterator[NamedTensors] = buckets(tensors, bucket_bytes)
                if fingerprint is not None or any(u.target.can(Capability.SAMPLED_CHECKSUMS) for u in left):
                    source = sampled(source, samples)
                checksums, loaded, seconds = await _load(left, source, version, transport, ends)
                nbytes, stage_seconds = max(nbytes, loaded), stage_seconds + seconds
                if fingerprint is not None and any(update.error is None for update in left):
                    fingerprint.require(samples)
                await _attest(left, checksums, samples, ends)
                await _each(left, "commit", lambda u: _commit(u, committed), ends)
                left = await _bystanders(left, transport)
                restored = await asyncio.gather(*(_abandon(u, unrestored) for u in left))
                left = [update for update, sound in zip(left, restored, strict=True) if sound]
                for update in left:
                    update.collateral = True
                if isinstance(tensors, Iterator):
                    break
                for update in left:
                    update.error, update.failed_at = None, 0.0
    except TimeoutError:
        for update in updates:
            if not update.committed:
                late = EngineTimeout(update.engine.name, f"it did not take version {version} within {deadline:g} s")
                update.error = update.error or late
    finally:
        # Also when the source of tensors raised or the caller was cancelled: no transaction is left open.
        await asyncio.shield(asyncio.gather(*(_abandon(u, unrestored) for u in updates)))
    reports = tuple(
        EngineReport(
            engine=u.engine.name,
            error=u.error,
            collateral=u.collateral,
            begin_seconds=u.legs.get("begin", 0.0),
            load_seconds=u.legs.get("load", 0.0),
            attest_seconds=u.legs.get("attest", 0.0),
            commit_seconds=u.legs.get("commit", 0.0),
            pause_seconds=u.legs.get("pause", 0.0),
        )
        for u in updates
    )
    if all(report.error for report in reports):
        reasons = "; ".join(str(report.error) for report in reports)
        message = f"no engine took version {version}: {reasons}"
        lost = [report.error for report in reports if isinstance(report.error, EngineUnreachable)]
        raise EnginesLost(message, lost) if len(lost) == len(reports) else PublishError(message)
    return PublishReport(version, nbytes, time.monotonic() - started, stage_seconds, reports)


async def _reach(
    updates: Sequence[_Update],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    version: int,
    transport: Transport,
    ends: float,
) -> bool:
    """Finds out, before anything begins, which engines can't take these tensors or can't be reached. Returns whether
    any is left."""
    shapes = announced(tensors)
    if shapes is not None:
        await _each(updates, "check", lambda u: u.engine.check_tensors(shapes), ends)
    targets = [update.target for update in updates if update.error is None]
    unreached = await transport.open(targets, version, deadline=_share(ends)) if targets else {}
    for update in updates:
        update.error = update.error or unreached.get(update.engine.name)
    return any(update.error is None for update in updates)


async def _load(
    updates: Sequence[_Update], tensors: Iterator[NamedTensors], version: int, transport: Transport, ends: float
) -> tuple[dict[str, str], int, float]:
    """Streams the buckets: one is staged, and delivered, while the engines load the other. The transactions begin when
    the first is there, since there are engines that generate nothing from then on. Returns the checksum of each tensor
    (empty where the transport has not read the bytes), bytes and seconds of staging."""
    checksums: dict[str, str] = {}
    nbytes, stage_seconds = 0, 0.0
    source = transport.staged(tensors)

    async def next_bucket() -> _Arrival | None:
        started = time.monotonic()
        if (staged := await _next_of(source)) is None:
            return None
        sound = [update.target for update in updates if update.error is None]
        unreached = await transport.deliver(sound, deadline=_share(ends))
        return _Arrival(staged, time.monotonic() - started, unreached)

    arrival = await next_bucket()
    _leave_out(updates, arrival)
    await _each(updates, "begin", _breaking(transport, lambda u: _begin(u, version)), ends)
    while arrival is not None and any(update.error is None for update in updates):
        staged = arrival.staged
        stage_seconds += arrival.seconds
        nbytes += staged.nbytes
        again = {name for name, count in Counter(staged.names).items() if count > 1}
        if twice := sorted(again | (checksums.keys() & set(staged.names))):
            raise PublishError(f"the trainer named a tensor twice: {twice[0]}")
        checksums |= {name: staged.checksums.get(name, "") for name in staged.names}
        load = _loading(staged, transport, ends)
        following = asyncio.create_task(next_bucket())
        try:
            await asyncio.gather(
                _each(updates, "load", load, ends),
                transport.send(staged),
            )
        except BaseException:
            following.cancel()
            # Its thread writes into a slot, and nothing may free that under it.
            await asyncio.gather(following, return_exceptions=True)
            raise
        arrival = await following
        _leave_out(updates, arrival)
    return checksums, nbytes, stage_seconds


async def _next_of(source: Iterator[StagedBucket]) -> StagedBucket | None:
    """The next bucket, staged in a thread."""
    staging = asyncio.create_task(asyncio.to_thread(next, source, None))
    try:
        return await asyncio.shield(staging)
    except asyncio.CancelledError:
        await asyncio.wait([staging])  # the thread writes into a slot, and the next publish must not find it there
        raise


def _leave_out(updates: Sequence[_Update], arrival: _Arrival | None) -> None:
    """Those whose host the bucket did not reach."""
    unreached = arrival.unreached if arrival is not None else {}
    for update in updates:
        if update.error is None and (error := unreached.get(update.engine.name)) is not None:
            update.error, update.collateral = error, True


def _loading(staged: StagedBucket, transport: Transport, ends: float) -> Step:
    async def load(update: _Update) -> None:
        if reason := transport.broken(update.engine):
            raise EngineFailed(update.engine.name, reason)
        await update.engine.load(staged.bucket_for(update.target), deadline=_share(ends))

    return _breaking(transport, load)


def _breaking(transport: Transport, step: Step) -> Step:
    """Lets nobody wait for a broadcast that an engine will not take part in."""

    async def run(update: _Update) -> None:
        try:
            await step(update)
        except BaseException:
            transport.interrupt(update.engine)
            raise

    return run


async def _bystanders(updates: Sequence[_Update], transport: Transport) -> list[_Update]:
    """Those that failed because others broke the broadcast off."""
    failed = sorted((u for u in updates if u.error is not None and u.failed_at), key=lambda u: u.failed_at)
    collateral = await transport.collateral([update.engine for update in failed])
    return [update for update in failed if update.engine.name in collateral]


def _share(ends: float) -> float:
    """Seconds that one step on one engine may take."""
    return max(ends - time.monotonic(), 0.0) * STEP_SHARE


async def _begin(update: _Update, version: int) -> None:
    if not update.target.can(Capability.STAGED_UPDATE):
        update.paused_at = update.paused_at or time.monotonic()
    update.begun = True  # also where its answer is lost
    try:
        await update.engine.begin_update(version)
    except EngineRefused:
        update.begun = False
        raise


async def _attest(updates: Sequence[_Update], sent: Mapping[str, str], samples: Mapping[str, str], ends: float) -> None:
    """Compares what the engines hold with what was sent, and with what engines alike hold."""
    held: dict[str, Mapping[str, str]] = {}
    alike = Counter(_likeness(u) for u in updates if u.error is None)

    async def ask(update: _Update) -> None:
        if update.target.can(Capability.CHECKSUMS) and all(sent.values()):
            _require_sent(update.engine.name, await update.engine.checksums(), sent)
            return
        if update.target.can(Capability.SAMPLED_CHECKSUMS):
            _require_sent(update.engine.name, await update.engine.sampled_checksums(), samples)
        if update.target.can(Capability.OWN_CHECKSUMS) and alike[_likeness(update)] > 1:
            held[update.engine.name] = await update.engine.checksums()

    await _each(updates, "attest", ask, ends)
    first: dict[object, _Update] = {}
    for update in updates:
        if update.error is None and update.engine.name in held:
            other = first.setdefault(_likeness(update), update)
            if held[update.engine.name] != held[other.engine.name]:
                # Nobody can tell which of the two is wrong.
                for one, two in ((update, other), (other, update)):
                    one.error = EngineFailed(one.engine.name, f"it holds other weights than {two.engine.name}")


def _likeness(update: _Update) -> tuple[str, str, int]:
    """Engines of which this is the same lay out their tensors in the same way."""
    info = update.target.info
    return info.kind, info.engine_version, info.ranks


def _require_sent(engine: str, held: Mapping[str, str], sent: Mapping[str, str]) -> None:
    if missing := sent.keys() ^ held.keys():
        raise EngineFailed(engine, f"tensors that only one side has: {', '.join(sorted(missing)[:3])}")
    if wrong := [name for name, value in sent.items() if held[name] != value]:
        raise EngineFailed(engine, f"{len(wrong)} of {len(sent)} tensors are not what was sent, {wrong[0]} among them")


async def _commit(update: _Update, committed: Callable[[str], Awaitable[None]]) -> None:
    await update.engine.commit()
    update.begun, update.committed = False, True
    if update.paused_at is not None:
        update.legs["pause"] = time.monotonic() - update.paused_at
    await committed(update.engine.name)


async def _abandon(update: _Update, unrestored: Callable[[str, EngineError], Awaitable[None]]) -> bool:
    """Rolls back a transaction that was not committed. Returns whether the engine is sound: one that only has no way
    back is."""
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
        await unrestored(name, failed)
        return isinstance(failed, EngineRefused)
    return True


async def _each(updates: Sequence[_Update], leg: str, step: Step, ends: float) -> None:
    """Takes one step on every engine that has not failed; an engine's error ends its own transaction only."""

    async def guarded(update: _Update) -> None:
        begun, share = time.monotonic(), _share(ends)
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
