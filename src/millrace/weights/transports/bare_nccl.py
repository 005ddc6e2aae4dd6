"""A group of NCCL alone, for receivers that have no group of torch.distributed around theirs: vLLM's own transfer
engine."""

import asyncio
from typing import Any, Self

import torch
import torch.distributed as dist

from millrace.engines.vllm.payload import UNIQUE_ID_KEY, unique_id
from millrace.types import Capability
from millrace.weights.transports.base import TransportContext
from millrace.weights.transports.process_group import ProcessGroupTransport, SendingGroup, nccl_device

OWN_KEY = "0"  # where torch puts the id of a group's communicator


class BareNcclGroup(SendingGroup):
    """Receivers find the communicator's id in the store, enter it, and sum one element over all ranks before anything
    else."""

    async def join(self) -> None:
        ids = dist.HashStore()
        self._group = self._nccl(ids)
        entering = self._in_thread(self._enter)
        handing = self._in_thread(lambda: self._hand_on(ids))
        await asyncio.gather(entering, handing)

    def _enter(self) -> None:
        one = torch.zeros(1, device=self._device)
        self._group.allreduce([one]).wait()
        torch.cuda.synchronize(self._device)

    def _hand_on(self, ids: Any) -> None:
        ids.wait([OWN_KEY], self._deadline)
        self._store.set(UNIQUE_ID_KEY, unique_id(bytes(ids.get(OWN_KEY))))


class BareNcclTransport(ProcessGroupTransport):
    """A broadcast by NCCL to vLLM's own transfer engine."""

    needs = frozenset({Capability.UPDATE_FROM_BARE_NCCL})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(BareNcclGroup, nccl_device(), together=False)
