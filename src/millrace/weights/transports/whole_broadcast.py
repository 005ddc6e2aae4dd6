"""Transports that broadcast whole buckets in a process group, each while the engines load the one before.

The tensors of a bucket are copied into one piece of memory, since one broadcast of gigabytes takes a fraction of the
time of a thousand small ones. There are two such pieces here and two in each rank of an engine.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch

from millrace.errors import EngineError
from millrace.types import Capability, ProcessGroupBucket
from millrace.weights.plan import padded
from millrace.weights.transports import process_group
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, specs_of
from millrace.weights.transports.cuda_ipc import DeviceSlot, copy_on_gpu
from millrace.weights.transports.process_group import BroadcastBucket, ProcessGroupTransport
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.slots import copy_to_host, samples_in


class WholeBroadcastTransport(ProcessGroupTransport):
    """A broadcast of buckets from `device` to engines that receive ahead of their loads. See ProcessGroupTransport."""

    needs = frozenset({Capability.WHOLE_BROADCASTS})
    by_bucket = True
    samples_buckets = True

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        super().__init__(kind, device, together=together)
        self._slots: dict[int, DeviceSlot] = {}
        self._number = 0  # of the next bucket
        self._staged: BroadcastBucket | None = None  # the last one
        self._first = 0  # the number of this publish's first bucket

    async def open(
        self, targets: Sequence[PublishTarget], version: int, *, deadline: float
    ) -> Mapping[str, EngineError]:
        """See ProcessGroupTransport."""
        self._first = self._number
        return await super().open(targets, version, deadline=deadline)

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
        number, self._number = self._number, self._number + 1

        def bucket_for(target: PublishTarget) -> ProcessGroupBucket:
            return ProcessGroupBucket(self._group_of(target.engine).name, specs, number)

        names, samples = tuple(spec.name for spec in specs), partial(samples_in, memory, specs)
        self._staged = BroadcastBucket(bucket_for, checksums, names, nbytes, (memory,), number, samples=samples)
        return self._staged

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """Broadcast the bucket that was staged last, while the engines load the one before.

        The first one has to wait for `load`: the engines still generate, and NCCL must not run beside what they do. If
        the broadcast fails, so does `load`.
        """
        staged, number, engines = self._staged, self._number - 1, [target.engine for target in targets]
        if staged is None or number == self._first:
            return {}
        ahead = [
            joined
            for joined in self._joined
            # Buckets are broadcast in order. If that before has not begun yet, this one has to wait for `load`.
            if joined.group.broken is None and joined.sent == number - 1
            if any(engine in engines for engine in joined.engines)
        ]
        with suppress(TimeoutError):  # a group whose broadcast was under way is broken then
            async with asyncio.timeout(deadline):
                await asyncio.gather(*(joined.send(staged) for joined in ahead))
        return {}

    async def close(self) -> None:
        await super().close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


class GlooTransport(WholeBroadcastTransport, process_group.GlooTransport):
    """A broadcast of whole buckets from the trainer's CPU memory, over TCP."""


class NcclTransport(WholeBroadcastTransport, process_group.NcclTransport):
    """A broadcast of whole buckets by NCCL from the trainer's GPU."""
