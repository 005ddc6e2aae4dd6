"""Transports that broadcast buckets in a process group of torch.distributed: by gloo over TCP, or by NCCL between GPUs.
Trainer and engines may be on any hosts.

The trainer is rank 0. Engines join before the first update begins, while they generate. A group is kept from one
publish to the next. It is replaced when a broadcast in it has failed or when the engines change, because a group can't
be used once one of its ranks is gone.
"""

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from millrace.checksum import tensor_checksum
from millrace.engines.base import Engine
from millrace.errors import EngineError, EngineFailed, LocalError, PublishError
from millrace.launch.ports import own_address
from millrace.types import Capability, Health, ProcessGroup, ProcessGroupBucket
from millrace.weights.environment import settings
from millrace.weights.transports.base import (
    BucketTransport,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    TransportContext,
    specs_of,
)

POLL_SECONDS = 0.0005
HEALTH_DEADLINE = LEAVE_DEADLINE = 2.0
UNHEALTHY = (Health.BUSY, Health.DEAD)
# Without these, torch's watchdog ends this process when an engine dies or is slow.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

T = TypeVar("T")


class SendingGroup:
    """Rank 0 of a process group, in this process. The engines are the other ranks.

    name: the group's name.
    device: where the tensors to send are; a GPU for NCCL, the CPU for gloo.
    address: the address of this host that the ranks meet at. The port is `port`.
    receivers: the number of the engines' ranks. All must join, and load, at the same time.
    deadline: the seconds that joining may take. With gloo, sending one tensor may take no longer either; torch raises
        RuntimeError when it does.
    """

    def __init__(self, name: str, device: torch.device, address: str, *, receivers: int, deadline: float) -> None:
        self.name, self.backend, self._world = name, backend_of(device), 1 + receivers
        self._device = device
        self.broken: str | None = None  # why nothing more can be sent
        self.seconds, self._deadline = deadline, timedelta(seconds=deadline)
        self._address = address
        self._group: Any = None
        # The listener that torch creates listens on all of the host's addresses.
        listener = socket.create_server((address, 0))
        self.port: int = listener.getsockname()[1]
        self._store: Any = dist.TCPStore(
            address,
            self.port,
            self._world,
            is_master=True,
            timeout=self._deadline,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    async def join(self) -> None:
        """Wait until all ranks have joined. NCCL's ranks join during the first broadcast. Raises RuntimeError if they
        do not join in time, or if `abort` is called."""
        self._group = await self._in_thread(self._join)

    def _join(self) -> Any:
        """Create the group, with the store keys that torch uses for a group of this name."""
        store = self._store
        for prefix in (self.name, f"{self.name}/", f"{self._device.type}/"):
            store = dist.PrefixStore(prefix, store)
        if self.backend == "gloo":
            options: Any = dist.ProcessGroupGloo._Options()
            options._timeout = self._deadline
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
            return dist.ProcessGroupGloo(store, 0, self._world, options)
        return self._nccl(store)

    def _nccl(self, store: Any) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * self._deadline + timedelta(minutes=1)
        with settings(NCCL_SETTINGS):
            return dist.ProcessGroupNCCL(store, 0, self._world, options)

    async def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors to all ranks. Each must be contiguous and on the group's device. Raises RuntimeError if the
        broadcast fails, or if `abort` is called. It has no deadline of its own."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # In a thread: NCCL's first broadcast waits until the engines have joined, by calls of this event loop.
        for work in await self._in_thread(lambda: [self._group.broadcast([tensor], options) for tensor in tensors]):
            await self._until(work.is_completed)  # NCCL's wait() ends when work is queued; gloo's can't be interrupted
            work.wait()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, and return its result. If the group is aborted before, the thread is abandoned: NCCL
        waits for a rank that never joins, and can't be interrupted."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        await self._until(done.done)
        return done.result()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.broken is not None:
                raise RuntimeError(self.broken)
            await asyncio.sleep(POLL_SECONDS)

    def abort(self, reason: str) -> None:
        """End the broadcast that is running. The group can't be used after that."""
        if self.broken is None:
            self.broken = reason
            if self._group is not None:
                threading.Thread(target=self._group.abort, daemon=True).start()  # NCCL's abort is slow

    def close(self) -> None:
        """Leave the group, and free it."""
        group, self._group, self._store = self._group, None, None
        if group is not None and self.broken is not None:
            # In a thread: gloo's shutdown waits for the broadcast that was aborted.
            threading.Thread(target=group.shutdown, daemon=True).start()
        elif group is not None:
            group.shutdown()


@dataclass(frozen=True, slots=True)
class BroadcastBucket(StagedBucket):
    """A bucket and the tensors to broadcast. They are not copied if they are contiguous and on the group's device."""

    tensors: tuple[torch.Tensor, ...]


@dataclass(slots=True)
class _Joined:
    """A group and the engines in it."""

    group: SendingGroup
    engines: list[Engine]


class ProcessGroupTransport(BucketTransport):
    """A broadcast from `device` to the engines: by NCCL from a GPU, by gloo from the CPU.

    kind: the class of the groups.
    together: whether all engines are in one group, which needs the least bandwidth. Otherwise each engine is in its own
        group, so that no engine waits for another.
    """

    needs = frozenset({Capability.UPDATE_FROM_PROCESS_GROUP})

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        self._kind, self._device, self._together = kind, device, together
        self._joined: list[_Joined] = []

    async def open(
        self,
        targets: Sequence[PublishTarget],
        version: int,  # noqa: ARG002
        *,
        deadline: float,
    ) -> Mapping[str, EngineError]:
        """Form a group for each engine that has no usable one. Return the engines that can't join, and why."""
        wanted = [list(targets)] if self._together else [[target] for target in targets]
        # A group keeps the deadline that it was created with. A publish with a much longer deadline replaces the group.
        kept = [joined for joined in self._joined if joined.group.broken is None]
        kept = [joined for joined in kept if joined.group.seconds > deadline / 4]
        kept = [joined for joined in kept if joined.engines in [[t.engine for t in members] for members in wanted]]
        await self._leave([joined for joined in self._joined if joined not in kept])
        self._joined = kept
        grouped = [joined.engines for joined in kept]
        failed: dict[str, EngineError] = {}
        for errors in await asyncio.gather(
            *(self._form(members, deadline / 2) for members in wanted if [t.engine for t in members] not in grouped)
        ):
            failed |= errors
        return failed

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:  # noqa: ARG002 (nothing is copied to a slot)
        specs = specs_of(tensors)
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

    async def send(self, staged: StagedBucket) -> None:
        """Broadcast the bucket in all groups. If that fails, the engines' `load` calls fail too and say so."""
        assert isinstance(staged, BroadcastBucket)

        async def broadcast(group: SendingGroup) -> None:
            try:
                await group.broadcast(staged.tensors)
            except RuntimeError as error:
                group.abort(f"the broadcast failed: {_first_line(error)}")
            except asyncio.CancelledError:
                group.abort("the publish was cancelled")
                raise

        await asyncio.gather(*(broadcast(joined.group) for joined in self._joined if joined.group.broken is None))

    def broken(self, engine: Engine) -> str | None:
        return self._group_of(engine).broken

    def interrupt(self, engine: Engine) -> None:
        self._group_of(engine).abort(f"{engine.name} failed, which ended the broadcast to all engines in its group")

    async def collateral(self, failed: Sequence[Engine]) -> set[str]:
        found = set()
        for joined in self._joined:
            lost = [engine for engine in failed if engine in joined.engines]
            if len(lost) > 1 and joined.group.broken is not None:
                found |= {engine.name for engine in lost} - await _at_fault(lost)
        return found

    async def close(self) -> None:
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
            group = ProcessGroup(name, sending.backend, address, sending.port, offset, 1 + sum(ranks))
            try:
                await engine.join_group(group, deadline=seconds)
            except EngineError as error:
                failed[engine.name] = error
                sending.abort(f"{engine.name} did not join")

        async def join_as_sender() -> str | None:
            try:
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


def backend_of(device: torch.device) -> str:
    """Return torch's name of the backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


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
        raise PublishError("publish.transport is nccl, and torch finds no GPU in the trainer's process")
    return torch.device("cuda", torch.cuda.current_device())
