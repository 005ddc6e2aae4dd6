"""Trainer and engines on any hosts: buckets are broadcast in a process group of torch.distributed, by gloo (TCP) or by
NCCL (from one GPU to others).

The trainer is rank 0. Engines join before the first update begins, while they generate. A group is kept, and made anew
when a broadcast in it has broken off, or the engines are others: it is of no more use when one of its ranks is gone.
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
UNWELL = (Health.BUSY, Health.DEAD)
# Torch's watchdog would end this process when an engine dies, or is slow.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

T = TypeVar("T")


class SendingGroup:
    """This process as rank 0 of the group `name`, with `receivers` ranks of engines, which meet at `address`, at
    `port`. They must join, and load, at the same time. What is sent lies on `device`: a GPU for NCCL, the CPU for gloo.
    Joining ends after `deadline` seconds, and with gloo the sending of a tensor does, by torch's own error (a
    RuntimeError)."""

    def __init__(self, name: str, device: torch.device, address: str, *, receivers: int, deadline: float) -> None:
        self.name, self.backend, self._world = name, backend_of(device), 1 + receivers
        self._device = device
        self.broken: str | None = None  # why nothing more can be sent
        self.seconds, self._deadline = deadline, timedelta(seconds=deadline)
        self._address = address
        self._group: Any = None
        # Torch's own would listen on all of the host's addresses.
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
        """Waits until all are there; NCCL's ranks meet at the first broadcast. Raises RuntimeError where they do not
        come, or that is broken off."""
        self._group = await self._in_thread(self._join)

    def _join(self) -> Any:
        """The keys in the store are those that torch makes for a group of this name."""
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
        """Returns when they are sent; each is contiguous, and on the group's device. Raises RuntimeError
        where that fails, or is broken off: the caller has the deadline."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # In a thread: NCCL's first waits until the engines are there, and they come by calls of this event loop.
        for work in await self._in_thread(lambda: [self._group.broadcast([one], options) for one in tensors]):
            await self._until(work.is_completed)  # NCCL's own wait ends with the queueing, gloo's can't be broken off
            work.wait()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises. Where the group breaks off before, its thread is left behind: NCCL waits for
        a rank that never comes, and can't be told not to."""
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
        """Breaks off what is being broadcast; the group is of no more use."""
        if self.broken is None:
            self.broken = reason
            if self._group is not None:
                threading.Thread(target=self._group.abort, daemon=True).start()  # NCCL's takes its time

    def close(self) -> None:
        group, self._group, self._store = self._group, None, None
        if group is not None and self.broken is not None:
            # Gloo's own end waits for what was broken off.
            threading.Thread(target=group.shutdown, daemon=True).start()
        elif group is not None:
            group.shutdown()


@dataclass(frozen=True, slots=True)
class BroadcastBucket(StagedBucket):
    """With the tensors that are broadcast; they are the trainer's own wherever those can be sent as they are."""

    tensors: tuple[torch.Tensor, ...]


@dataclass(slots=True)
class _Joined:
    """A group, and the engines in it."""

    group: SendingGroup
    engines: list[Engine]


class ProcessGroupTransport(BucketTransport):
    """A broadcast from `device` to the engines: by NCCL from a GPU, by gloo from the CPU. `kind` is the class of the
    groups. With `together`, all engines are in one group, which takes the least bandwidth. Otherwise each is in a group
    of its own, so that none waits for another."""

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
        """Joins those that are in no group that can be used. One that can't join is left out."""
        wanted = [list(targets)] if self._together else [[target] for target in targets]
        # A group keeps the time that it was made with; a publish that has much more makes another.
        kept = [one for one in self._joined if one.group.broken is None and one.group.seconds > deadline / 4]
        kept = [one for one in kept if one.engines in [[t.engine for t in some] for some in wanted]]
        await self._leave([one for one in self._joined if one not in kept])
        self._joined = kept
        there = [one.engines for one in kept]
        failed: dict[str, EngineError] = {}
        for errors in await asyncio.gather(
            *(self._form(some, deadline / 2) for some in wanted if [t.engine for t in some] not in there)
        ):
            failed |= errors
        return failed

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:  # noqa: ARG002 (nothing is copied into one)
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
        """Where it fails, the engines' own loading tells."""
        assert isinstance(staged, BroadcastBucket)

        async def broadcast(group: SendingGroup) -> None:
            try:
                await group.broadcast(staged.tensors)
            except RuntimeError as error:
                group.abort(f"the broadcast broke off: {_first_line(error)}")
            except asyncio.CancelledError:
                group.abort("the publish was cancelled")
                raise

        await asyncio.gather(*(broadcast(one.group) for one in self._joined if one.group.broken is None))

    def broken(self, engine: Engine) -> str | None:
        return self._group_of(engine).broken

    def interrupt(self, engine: Engine) -> None:
        self._group_of(engine).abort(f"{engine.name} has failed, and others got the weights by the same broadcast")

    async def collateral(self, failed: Sequence[Engine]) -> set[str]:
        found = set()
        for one in self._joined:
            lost = [engine for engine in failed if engine in one.engines]
            if len(lost) > 1 and one.group.broken is not None:
                found |= {engine.name for engine in lost} - await _at_fault(lost)
        return found

    async def close(self) -> None:
        await self._leave(self._joined)
        self._joined = []

    def _group_of(self, engine: Engine) -> SendingGroup:
        return next(one.group for one in self._joined if engine in one.engines)

    async def _form(self, targets: Sequence[PublishTarget], seconds: float) -> dict[str, EngineError]:
        """A group of as many as can join. Returns why the others can't."""
        failed: dict[str, EngineError] = {}
        while left := [target for target in targets if target.engine.name not in failed]:
            errors = await self._join(left, seconds)
            if not errors:
                break
            failed |= errors
        return failed

    async def _join(self, targets: Sequence[PublishTarget], seconds: float) -> dict[str, EngineError]:
        """Who is to blame that it came to nothing, and why. Empty where all are in."""
        ranks = [target.info.ranks for target in targets]
        engines = {target.engine.name: target.engine for target in targets}
        name = f"millrace-{secrets.token_hex(4)}"
        failed: dict[str, EngineError] = {}
        try:
            addresses = [own_address(target.engine.url) for target in targets]
            address = next((one for one in addresses if not one.startswith("127.")), addresses[0])
            own = self._kind(name, self._device, address, receivers=sum(ranks), deadline=seconds)
        except (OSError, RuntimeError) as error:
            return {one: LocalError(one, f"no group could be made for it: {_first_line(error)}") for one in engines}
        joined = _Joined(own, list(engines.values()))

        async def join(engine: Engine, offset: int) -> None:
            group = ProcessGroup(name, own.backend, address, own.port, offset, 1 + sum(ranks))
            try:
                await engine.join_group(group, deadline=seconds)
            except EngineError as error:
                failed[engine.name] = error
                own.abort(f"{engine.name} did not join")

        async def join_too() -> str | None:
            try:
                await own.join()
            except RuntimeError as error:
                own.abort(reason := _first_line(error))  # nothing of it goes on waiting
                return reason
            return None

        joins = (join(target.engine, 1 + sum(ranks[:index])) for index, target in enumerate(targets))
        try:
            (alone, *_) = await asyncio.gather(join_too(), *joins)
        except BaseException:
            await asyncio.shield(self._leave([joined]))
            raise
        if not failed and alone is None:
            self._joined.append(joined)
            return {}
        await self._leave([joined])
        if not failed:
            return {one: EngineFailed(one, f"the group at {address} did not form: {alone}") for one in engines}
        guilty = await _at_fault([engines[one] for one in failed])
        return {one: failed[one] for one in guilty}

    async def _leave(self, joined: Sequence[_Joined]) -> None:
        """As far as that goes: who can't leave has lost the group anyway."""

        async def leave(engine: Engine, group: str) -> None:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LEAVE_DEADLINE):
                    await engine.leave_group(group)

        await asyncio.gather(*(leave(engine, one.group.name) for one in joined for engine in one.engines))
        for one in joined:
            one.group.close()


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


async def _at_fault(engines: Sequence[Engine]) -> set[str]:
    """Of engines that failed together, in this order: those that are dead or do not answer, or else the first."""
    states = await asyncio.gather(*(engine.health(deadline=HEALTH_DEADLINE) for engine in engines))
    unwell = {engine.name for engine, state in zip(engines, states, strict=True) if state in UNWELL}
    return unwell or {engines[0].name}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class GlooTransport(ProcessGroupTransport):
    """A broadcast from the trainer's CPU memory, over TCP."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(SendingGroup, torch.device("cpu"), together=False)


class NcclTransport(ProcessGroupTransport):
    """A broadcast from the trainer's GPU."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        # Between GPUs of one host, NCCL does not notice that a rank has died, and an SGLang in its group waits forever.
        return cls(SendingGroup, nccl_device(), together=not context.here)


def nccl_device() -> torch.device:
    """Return torch's current GPU. Raises PublishError if there is none."""
    if not torch.cuda.is_available():
        raise PublishError("publish.transport is nccl, and the trainer's torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())
