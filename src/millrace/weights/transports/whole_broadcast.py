"""Transports that broadcast whole buckets in a process group, each while the engines load the one before.

The tensors of a bucket are copied into one piece of memory, since one broadcast of gigabytes takes a fraction of the
time of a thousand small ones. There are two such pieces here and two in each rank of an engine.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from millrace.buckets import ProcessGroupBucket
from millrace.errors import EngineError
from millrace.types import Capability
from millrace.weights.transports import process_group
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket
from millrace.weights.transports.cuda_ipc import DeviceSlot
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.parts_groups import PartsGroup, PartsGroups
from millrace.weights.transports.process_group import BroadcastBucket, ProcessGroupTransport
from millrace.weights.transports.sending_group import SendingGroup, backend_of
from millrace.weights.transports.slots import fill


class WholeBroadcastTransport(ProcessGroupTransport):
    """A broadcast of buckets from `device` to engines that receive ahead of their loads. See ProcessGroupTransport.

    If the ranks of the trainer send the parts themselves (`weights/shards/apart.py`), their groups are kept here too.
    An engine is in one group at a time.
    """

    needs = frozenset({Capability.WHOLE_BROADCASTS})
    by_bucket = True
    samples_buckets = loads_ahead = True

    def __init__(self, kind: type[SendingGroup], device: torch.device, *, together: bool) -> None:
        super().__init__(kind, device, together=together)
        self._slots: dict[int, DeviceSlot] = {}
        self._number = 0  # of the next bucket
        self._parts = PartsGroups(backend_of(device))

    @property
    def device(self) -> torch.device:
        """Where the tensors are that are sent."""
        return self._device

    async def open(
        self, targets: Sequence[PublishTarget], version: int, *, deadline: float
    ) -> Mapping[str, EngineError]:
        await self._parts.close()
        return await super().open(targets, version, deadline=deadline)

    async def parts_groups(
        self, targets: Sequence[PublishTarget], senders: int, *, several_hosts: bool, deadline: float
    ) -> list[PartsGroup]:
        """Leave the groups of broadcasts, and return a group of several senders for each engine. The arguments and
        errors are those of `PartsGroups.opened`."""
        await self._end()
        return await self._parts.opened(targets, senders, several_hosts=several_hosts, deadline=deadline)

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

    async def close(self) -> None:
        await self._parts.close()
        await self._end()

    async def _end(self) -> None:
        await super().close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


class GlooTransport(WholeBroadcastTransport, process_group.GlooTransport):
    """A broadcast of whole buckets from the trainer's CPU memory, over TCP."""


class NcclTransport(WholeBroadcastTransport, process_group.NcclTransport):
    """A broadcast of whole buckets by NCCL from the trainer's GPU."""
