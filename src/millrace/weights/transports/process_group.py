"""Transports that broadcast tensors in a process group of torch.distributed: by gloo over TCP, or by NCCL between GPUs.
Trainer and engines may be on any hosts.

The trainer is rank 0. Engines join before the first update begins, while they generate. A group is kept from one
publish to the next. It is replaced when a broadcast in it has failed or when the engines change, because a group can't
be used once one of its ranks is gone.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from millrace.buckets import ProcessGroup, ProcessGroupBucket
from millrace.checksum import tensor_checksum
from millrace.engines.base import Engine
from millrace.errors import EngineError, EngineFailed, LocalError, PublishError
from millrace.launch.ports import own_address
from millrace.types import Capability, Health
from millrace.weights.step import StepResult
from millrace.weights.transports.base import (
    BucketTransport,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    TransportContext,
    load_bucket,
)
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.parts_groups import LEAVE_DEADLINE, PartsGroup, PartsGroups
from millrace.weights.transports.sending_group import SendingGroup, backend_of

HEALTH_DEADLINE = 2.0
UNHEALTHY = (Health.BUSY, Health.DEAD)


@dataclass(frozen=True, slots=True)
class BroadcastBucket(StagedBucket):
    """A bucket and the tensors to broadcast, which are on the group's device.

    number: with one, there is one tensor, the bytes of the bucket, and the ranks know it by this number.
    """

    tensors: tuple[torch.Tensor, ...]
    number: int | None = None


@dataclass(slots=True)
class _Joined:
    """A group and the engines in it.

    loaded: whether the engines have loaded a bucket in it since the last `open`.
    failed: the engines that have failed since the last `open`, in the order of their failures.
    """

    group: SendingGroup
    engines: list[Engine]
    loaded: bool = False
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    failed: list[Engine] = field(default_factory=list)

    def fail(self, engine: Engine) -> None:
        """End the broadcast, so that the other engines do not wait for this one."""
        if engine not in self.failed:
            self.failed.append(engine)
        self.group.abort(f"{engine.name} failed, which ended the broadcast to all engines in its group")

    async def send(self, staged: BroadcastBucket) -> None:
        """Broadcast a bucket after the one before it. If it fails, `group.broken` says why."""
        async with self.sending:
            try:
                if staged.number is None:
                    await self.group.broadcast(staged.tensors)
                else:
                    await self.group.broadcast_bucket(staged.number, staged.tensors[0])
            except RuntimeError as error:
                self.group.abort(f"the broadcast failed: {_first_line(error)}")
            except BaseException:
                self.group.abort("the publish was cancelled")
                raise


class ProcessGroupTransport(BucketTransport):
    """A broadcast from `device` to the engines: by NCCL from a GPU, by gloo from the CPU.

    kind: the class of the groups.
    together: whether all engines are in one group, which needs the least bandwidth. Otherwise each engine is in its own
        group, so that no engine waits for another.

    If the ranks of the trainer send parts themselves (`weights/shards/apart.py`), their groups are kept here too. An
    engine is in one group at a time.
    """

    needs = frozenset({Capability.UPDATE_FROM_PROCESS_GROUP})
    by_bucket: ClassVar[bool] = False  # see `ProcessGroup`

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        self._kind, self._device, self.together = kind, device, together
        self._joined: list[_Joined] = []
        self._parts = PartsGroups(backend_of(device))

    @property
    def device(self) -> torch.device:
        """Where the tensors are that are sent."""
        return self._device

    async def parts_groups(
        self, targets: Sequence[PublishTarget], senders: int, *, several_hosts: bool, deadline: float
    ) -> list[PartsGroup]:
        """Leave the groups of broadcasts, and return a group of several senders for each engine. The arguments and
        errors are those of `PartsGroups.opened`."""
        await self._end()
        return await self._parts.opened(targets, senders, several_hosts=several_hosts, deadline=deadline)

    async def open(
        self,
        targets: Sequence[PublishTarget],
        version: int,  # noqa: ARG002
        *,
        deadline: float,
    ) -> Mapping[str, EngineError]:
        """Form a group for each engine that has no usable one. Return the engines that can't join, and why."""
        await self._parts.close()
        wanted = [list(targets)] if self.together else [[target] for target in targets]
        # A group keeps the deadline that it was created with. A publish with a much longer deadline replaces the group.
        # So does a publish after one that loaded nothing, because its engines failed before.
        kept = [joined for joined in self._joined if joined.group.broken is None and joined.loaded]
        kept = [joined for joined in kept if joined.group.seconds > deadline / 4]
        kept = [joined for joined in kept if joined.engines in [[t.engine for t in members] for members in wanted]]
        await self._leave([joined for joined in self._joined if joined not in kept])
        for joined in kept:
            joined.loaded = False
        self._joined = kept
        grouped = [joined.engines for joined in kept]
        failed: dict[str, EngineError] = {}
        for errors in await asyncio.gather(
            *(self._form(members, deadline / 2) for members in wanted if [t.engine for t in members] not in grouped)
        ):
            failed |= errors
        return failed

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:  # noqa: ARG002 (nothing is copied to a slot)
        specs = layout_of(tensors).specs
        sent = tuple(tensor.detach().to(self._device).contiguous() for _, tensor in tensors)
        names = tuple(spec.name for spec in specs)
        checksums = {}
        if self._device.type == "cpu":
            checksums = dict(zip(names, (tensor_checksum(tensor) for tensor in sent), strict=True))
        else:
            torch.cuda.current_stream(self._device).synchronize()

        def bucket_for(target: PublishTarget) -> ProcessGroupBucket:
            return ProcessGroupBucket(self._group_of(target.engine).name, specs)

        return BroadcastBucket(bucket_for, checksums, names, sum(tensor.nbytes for tensor in sent), sent)

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        """See `Transport.load`. Broadcasts the bucket in all groups meanwhile. If an engine of a group fails, or has
        failed before, the others of the group fail too, and are blameless."""
        assert isinstance(staged, BroadcastBucket)
        results: dict[str, StepResult] = {}

        async def load(joined: _Joined) -> None:
            members = [target for target in targets if target.engine in joined.engines]
            for engine in joined.engines:
                if engine not in [target.engine for target in members]:
                    joined.fail(engine)
            loaded = await _load_together(joined, members, staged, deadline)
            failed = [name for name, result in loaded.items() if result.error is not None]
            if failed and len(joined.failed) > 1:
                at_fault = await _at_fault(joined.failed)
                loaded |= {name: replace(loaded[name], blameless=name not in at_fault) for name in failed}
            results.update(loaded)

        async with asyncio.TaskGroup() as tasks:
            for joined in self._joined:
                tasks.create_task(load(joined))
        return results

    async def close(self) -> None:
        await self._parts.close()
        await self._end()

    async def _end(self) -> None:
        """End all broadcasts, and free what they need."""
        await self._leave(self._joined)
        self._joined = []

    def _group_of(self, engine: Engine) -> SendingGroup:
        return next(joined.group for joined in self._joined if engine in joined.engines)

    async def _form(self, targets: Sequence[PublishTarget], seconds: float) -> dict[str, EngineError]:
        """Form one group of all engines that can join. Return the engines that can't, and why."""
        failed: dict[str, EngineError] = {}
        while candidates := [target for target in targets if target.engine.name not in failed]:
            errors = await self._join(candidates, seconds)
            if not errors:
                break
            failed |= errors
        return failed

    async def _join(self, targets: Sequence[PublishTarget], seconds: float) -> dict[str, EngineError]:
        """Form one group of all these engines. Return the engines that are at fault if it fails, and why; empty if all
        have joined."""
        ranks = [target.info.ranks for target in targets]
        engines = {target.engine.name: target.engine for target in targets}
        name = f"millrace-{secrets.token_hex(4)}"
        failed: dict[str, EngineError] = {}
        try:
            addresses = [own_address(target.engine.url) for target in targets]
            address = next((address for address in addresses if not address.startswith("127.")), addresses[0])
            sending = self._kind(name, self._device, address, receivers=sum(ranks), deadline=seconds)
        except (OSError, RuntimeError) as error:
            reason = f"this process could not create a process group for it: {_first_line(error)}"
            return {engine: LocalError(engine, reason) for engine in engines}
        joined = _Joined(sending, list(engines.values()))

        async def join(engine: Engine, offset: int) -> None:
            place = address, sending.port, offset, 1 + sum(ranks)
            group = ProcessGroup(name, sending.backend, *place, by_bucket=self.by_bucket)
            try:
                await engine.join_group(group, deadline=seconds)
            except EngineError as error:
                failed[engine.name] = error
                sending.abort(f"{engine.name} did not join")

        async def join_as_sender() -> str | None:
            try:
                if not self.by_bucket:
                    await sending.join()
            except RuntimeError as error:
                sending.abort(reason := _first_line(error))  # ends the threads that still wait
                return reason
            return None

        joins = (join(target.engine, 1 + sum(ranks[:index])) for index, target in enumerate(targets))
        try:
            (unformed, *_) = await asyncio.gather(join_as_sender(), *joins)
        except BaseException:
            await asyncio.shield(self._leave([joined]))
            raise
        if not failed and unformed is None:
            self._joined.append(joined)
            return {}
        await self._leave([joined])
        if not failed:
            reason = f"the process group at {address} did not form: {unformed}"
            return {engine: EngineFailed(engine, reason) for engine in engines}
        return {engine: failed[engine] for engine in await _at_fault([engines[engine] for engine in failed])}

    async def _leave(self, joined: Sequence[_Joined]) -> None:
        """Have the engines leave these groups, and close them. Errors are ignored: an engine that can't leave a group
        has lost it already."""

        async def leave(engine: Engine, group: str) -> None:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LEAVE_DEADLINE):
                    await engine.leave_group(group)

        await asyncio.gather(*(leave(engine, each.group.name) for each in joined for engine in each.engines))
        for each in joined:
            each.group.close()


async def _load_together(
    joined: _Joined, members: Sequence[PublishTarget], staged: BroadcastBucket, deadline: float
) -> dict[str, StepResult]:
    """Broadcast the bucket in one group while its engines load it. The first engine that fails ends the broadcast."""
    group = joined.group

    async def load(target: PublishTarget) -> StepResult:
        if group.broken is not None:
            result = StepResult(0.0, EngineFailed(target.engine.name, group.broken))
        else:
            result = await load_bucket(target, staged, deadline)
        if result.error is not None:
            joined.fail(target.engine)
        return result

    try:
        async with asyncio.TaskGroup() as tasks:
            if group.broken is None:
                tasks.create_task(joined.send(staged))
            loading = {target.engine.name: tasks.create_task(load(target)) for target in members}
    except BaseException:
        group.abort("the publish was cancelled")
        raise
    joined.loaded = True
    return {name: task.result() for name, task in loading.items()}


async def _at_fault(engines: Sequence[Engine]) -> set[str]:
    """Return which of these engines caused a common failure: those that are dead or do not answer, or else the first.
    `engines` are in the order of their failures."""
    states = await asyncio.gather(*(engine.health(deadline=HEALTH_DEADLINE) for engine in engines))
    unhealthy = {engine.name for engine, state in zip(engines, states, strict=True) if state in UNHEALTHY}
    return unhealthy or {engines[0].name}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class GlooTransport(ProcessGroupTransport):
    """A broadcast from the trainer's CPU memory, over TCP."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(SendingGroup, torch.device("cpu"), together=False)


class NcclTransport(ProcessGroupTransport):
    """A broadcast by NCCL from the trainer's GPU."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        # Between GPUs of one host, NCCL does not notice that a rank has died, and an SGLang in the group waits forever.
        return cls(SendingGroup, nccl_device(), together=not context.here)


def nccl_device() -> torch.device:
    """Return torch's current GPU. Raises PublishError if there is none."""
    if not torch.cuda.is_available():
        raise PublishError("the transport nccl needs a GPU in the trainer's process, and torch finds none there")
    return torch.device("cuda", torch.cuda.current_device())
