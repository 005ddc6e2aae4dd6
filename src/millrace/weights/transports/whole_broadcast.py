"""Transports that broadcast whole buckets in a process group, each while the engines load the one before.

The tensors of a bucket are copied into one piece of memory, since one broadcast of gigabytes takes a fraction of the
time of a thousand small ones. There are two such pieces here and two in each rank of an engine.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Self

import torch

from millrace.errors import EngineError
from millrace.types import Capability, ProcessGroupBucket
from millrace.weights.plan import padded
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, TransportContext, specs_of
from millrace.weights.transports.cuda_ipc import DeviceSlot, copy_on_gpu
from millrace.weights.transports.process_group import BroadcastBucket, ProcessGroupTransport, nccl_device
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.slots import copy_to_host


class WholeBroadcastTransport(ProcessGroupTransport):
    """A broadcast of buckets from `device` to engines that receive ahead of their loads. See ProcessGroupTransport."""

    needs = frozenset({Capability.WHOLE_BROADCASTS})
    by_bucket = True

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        super().__init__(kind, device, together=together)
        self._slots: dict[int, DeviceSlot] = {}
        self._numbers = itertools.count()
        self._staged: BroadcastBucket | None = None  # the last one

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        specs = specs_of(tensors)
        nbytes = specs[-1].offset + padded(specs[-1].nbytes)
        if slot not in self._slots or self._slots[slot].bytes.nbytes < nbytes:
            if slot in self._slots:
                self._slots[slot].close()
            self._slots[slot] = DeviceSlot(nbytes, self._device)
        memory = self._slots[slot].bytes[:nbytes]
        checksums = {}
        if self._device.type == "cpu":
            checksums = copy_to_host(tensors, specs, memory)
        else:
            copy_on_gpu(tensors, specs, memory)
        number = next(self._numbers)

        def bucket_for(target: PublishTarget) -> ProcessGroupBucket:
            return ProcessGroupBucket(self._group_of(target.engine).name, specs, number)

        names = tuple(spec.name for spec in specs)
        self._staged = BroadcastBucket(bucket_for, checksums, names, nbytes, (memory,), number)
        return self._staged

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """Broadcast the bucket that was staged last, except for the first one, with which the engines join. They fail
        in `load` if it fails."""
        assert self._staged is not None
        engines = [target.engine for target in targets]
        ahead = [joined for joined in self._joined if joined.loaded and joined.group.broken is None]
        try:
            async with asyncio.timeout(deadline):
                await asyncio.gather(
                    *(joined.send(self._staged) for joined in ahead if any(one in engines for one in joined.engines))
                )
        except TimeoutError:  # the groups whose broadcast was under way are broken
            pass
        return {}

    async def close(self) -> None:
        await super().close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


class GlooTransport(WholeBroadcastTransport):
    """A broadcast from the trainer's CPU memory, over TCP."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(SendingGroup, torch.device("cpu"), together=False)


class NcclTransport(WholeBroadcastTransport):
    """A broadcast by NCCL from the trainer's GPU."""

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        # As for the transport of single tensors: on one host, an engine that dies must not hold up the others.
        return cls(SendingGroup, nccl_device(), together=not context.here)
