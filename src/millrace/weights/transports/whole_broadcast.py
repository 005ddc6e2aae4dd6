"""Transports that broadcast whole buckets in a process group, each while the engines load the one before.

The tensors of a bucket are copied into one piece of memory, since one broadcast of gigabytes takes a fraction of the
time of a thousand small ones. There are two such pieces here and two in each rank of an engine.
"""

from functools import partial

import torch

from millrace.buckets import ProcessGroupBucket
from millrace.types import Capability
from millrace.weights.transports import process_group
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket
from millrace.weights.transports.cuda_ipc import DeviceSlot
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.process_group import BroadcastBucket, ProcessGroupTransport
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.slots import fill


class WholeBroadcastTransport(ProcessGroupTransport):
    """A broadcast of buckets from `device` to engines that receive ahead of their loads. See ProcessGroupTransport."""

    needs = frozenset({Capability.WHOLE_BROADCASTS})
    by_bucket = True
    samples_buckets = loads_ahead = True

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        super().__init__(kind, device, together=together)
        self._slots: dict[int, DeviceSlot] = {}
        self._number = 0  # of the next bucket

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        layout = layout_of(tensors)
        if slot not in self._slots or self._slots[slot].bytes.nbytes < layout.nbytes:
            if slot in self._slots:
                self._slots[slot].close()
            self._slots[slot] = DeviceSlot(layout.nbytes, self._device)
        memory = self._slots[slot].bytes[: layout.nbytes]
        checksums = fill(memory, layout, tensors)
        number, self._number = self._number, self._number + 1

        def bucket_for(target: PublishTarget) -> ProcessGroupBucket:
            return ProcessGroupBucket(self._group_of(target.engine).name, layout.specs, number)

        samples = partial(layout.samples_in, memory)
        return BroadcastBucket(bucket_for, checksums, layout.names, layout.nbytes, (memory,), number, samples=samples)

    async def _end(self) -> None:
        await super()._end()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


class GlooTransport(WholeBroadcastTransport, process_group.GlooTransport):
    """A broadcast of whole buckets from the trainer's CPU memory, over TCP."""


class NcclTransport(WholeBroadcastTransport, process_group.NcclTransport):
    """A broadcast of whole buckets by NCCL from the trainer's GPU."""
