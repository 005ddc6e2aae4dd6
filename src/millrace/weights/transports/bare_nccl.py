"""A broadcast by NCCL to receivers that use NCCL without torch.distributed, such as vLLM's own transfer engine."""

import asyncio
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from millrace.engines.vllm.transfer import UNIQUE_ID_KEY, unique_id
from millrace.types import Capability
from millrace.weights.transports.base import TransportContext
from millrace.weights.transports.process_group import ProcessGroupTransport, nccl_device
from millrace.weights.transports.sending_group import SendingGroup, nccl_group

ID_KEY = "0"  # the store key of the communicator's id, as torch writes it


class BareNcclGroup(SendingGroup):
    """A group whose receivers read the communicator's id from the store. First of all, all ranks sum one element, as
    vLLM does."""

    async def join(self) -> None:
        ids = dist.HashStore()
        self._group = nccl_group(ids, 0, self._world, self.seconds)
        entering = self._in_thread(self._enter)
        sharing = self._in_thread(lambda: self._share_id(ids))
        await asyncio.gather(entering, sharing)

    def _enter(self) -> None:
        element = torch.zeros(1, device=self._device)
        self._group.allreduce([element]).wait()
        torch.cuda.synchronize(self._device)

    def _share_id(self, ids: Any) -> None:
        ids.wait([ID_KEY], timedelta(seconds=self.seconds))
        self._store.set(UNIQUE_ID_KEY, unique_id(bytes(ids.get(ID_KEY))))


class BareNcclTransport(ProcessGroupTransport):
    """A broadcast by NCCL to vLLM's own transfer engine."""

    needs = frozenset({Capability.UPDATE_FROM_BARE_NCCL})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(BareNcclGroup, nccl_device(), together=False)
