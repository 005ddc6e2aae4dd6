"""Buckets that a sender broadcasts to a torch process group, over Gloo or NCCL."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from millrace_environment import settings
from millrace_words import first_line

from .errors import RpcError
from .messages import TensorSpec, take
from .receive import view

# With these off, torch's watchdog does not end this process when the trainer dies.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class ReceivingGroup:
    """A sender's process group with this worker as a member. Rank 0, the sender, broadcasts.

    The store's keys have the prefixes that torch gives to a group of this name. Every wait ends after `timeout`
    seconds."""

    def __init__(self, wanted: dict[str, Any], rank: int) -> None:
        self._name, self._backend = take(wanted, "name", str), take(wanted, "backend", str)
        self._timeout = float(take(wanted, "timeout", int, float))
        address, port = take(wanted, "address", str), take(wanted, "port", int)
        rank, world_size = rank + take(wanted, "rank_offset", int), take(wanted, "world_size", int)
        if self._backend not in ("gloo", "nccl") or not 0 < rank < world_size:
            raise RpcError(f"rank {rank} of {world_size} cannot receive over {self._backend}")
        deadline = timedelta(seconds=self._timeout)
        try:
            store: Any = dist.TCPStore(address, port, world_size, is_master=False, timeout=deadline)
            for prefix in (self._name, f"{self._name}/", "cpu/" if self._backend == "gloo" else "cuda/"):
                store = dist.PrefixStore(prefix, store)
            if self._backend == "gloo":
                self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, deadline)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = 2 * deadline + timedelta(minutes=1)
                with settings(NCCL_SETTINGS):
                    self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        except RuntimeError as error:  # torch's DistError is one
            raise RpcError(f"could not join group {self._name} at {address}:{port}: {first_line(error)}") from error

    def receive(self, specs: Sequence[TensorSpec], nbytes: int, device: torch.device) -> torch.Tensor:
        """A bucket of `nbytes` bytes with the next tensors that rank 0 broadcasts: one for each spec, in their order.

        It is in the host's memory with Gloo, and on the device with NCCL."""
        bucket = torch.empty(nbytes, dtype=torch.uint8, device="cpu" if self._backend == "gloo" else device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            works = []
            for spec in specs:
                works.append(self._group.broadcast([view(bucket, spec)], options))
                if self._backend == "gloo":
                    works.pop().wait()
            self._await(works)
        except RuntimeError as error:
            raise RpcError(f"group {self._name}: the broadcast did not come: {first_line(error)}") from error
        return bucket

    def _await(self, works: list[Any]) -> None:
        """Wait until the tensors have arrived. NCCL's own wait returns when the transfer is queued."""
        ends = time.monotonic() + self._timeout
        while works and not works[-1].is_completed():
            if time.monotonic() > ends:
                self._group.abort()
                raise RuntimeError(f"not within {self._timeout:.0f} s; the group is broken, leave it")
            time.sleep(0.0005)
        for work in works:
            work.wait()

    def close(self) -> None:
        self._group.shutdown()
