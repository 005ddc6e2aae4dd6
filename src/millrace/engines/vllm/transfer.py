"""vLLM's own transfer engine, by which a server without Millrace's extension receives tensors over NCCL."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from millrace.buckets import ProcessGroup, ProcessGroupBucket
from millrace.engines.opcodes import PROTOCOL, STOP, Call, Name, encode
from millrace.errors import EngineFailed, EngineRefused

UNIQUE_ID_KEY = "broadcast_from/0/0"


class TransferEngine:
    """Receives the tensors of an update. vLLM opens a session for them.

    control: the adapter's `_control`. receiving: whether a session is open.
    """

    def __init__(self, control: Callable[..., Awaitable[Any]]) -> None:
        self.receiving = False
        self._control = control

    async def join(self, group: ProcessGroup, deadline: float) -> None:
        """Join a process group. It leaves the group that it was in."""
        place = {"master_address": group.address, "master_port": group.port}
        ranks = {"rank_offset": group.rank_offset, "world_size": group.world_size}
        await self._control("/init_weight_transfer_engine", {"init_info": place | ranks}, deadline=deadline)

    def loading(self, bucket: ProcessGroupBucket) -> Callable[[float], Awaitable[None]]:
        """Return a function that receives a bucket within a deadline in seconds."""
        tensors = {
            "names": [tensor.name for tensor in bucket.tensors],
            "dtype_names": [tensor.dtype for tensor in bucket.tensors],
            "shapes": [tensor.shape for tensor in bucket.tensors],
        }
        return partial(self._receive, tensors)

    async def _receive(self, tensors: Mapping[str, object], deadline: float) -> None:
        if not self.receiving:
            await self._control("/start_weight_update", {})
            self.receiving = True
        try:
            await self._control("/update_weights", {"update_info": tensors}, deadline=deadline)
        except (EngineFailed, EngineRefused):
            self.receiving = False  # vLLM has closed the session
            raise

    async def end(self) -> None:
        """End the session, if one is open."""
        if self.receiving:
            await self._control("/finish_weight_update", None)
            self.receiving = False


def unique_id(value: bytes) -> bytes:
    """Return the value that vLLM's transfer engine reads from the sender's store under UNIQUE_ID_KEY.

    It is a pickled object of vLLM's own class with NCCL's id of the group. vLLM 0.32 accepts JSON too, 0.23 does not.
    """
    kind = Name("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId")
    return PROTOCOL + encode(Call(Name("_ctypes", "_unpickle"), (kind, ({}, value)))) + STOP
