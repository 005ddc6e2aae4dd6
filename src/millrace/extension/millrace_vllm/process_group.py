"""Tensors that a sender broadcasts to a torch process group, over Gloo or NCCL."""

from collections.abc import Sequence
from typing import Any

import torch
from millrace_group import connect, join, receive, wait
from millrace_words import first_line

from .errors import RpcError
from .messages import TensorSpec, take
from .receive import view


class ReceivingGroup:
    """A sender's process group with this worker as a member. Rank 0, the sender, broadcasts.

    Every wait ends after `timeout` seconds."""

    def __init__(self, wanted: dict[str, Any], rank: int) -> None:
        self._name, self._backend = take(wanted, "name", str), take(wanted, "backend", str)
        self._timeout = float(take(wanted, "timeout", int, float))
        address, port = take(wanted, "address", str), take(wanted, "port", int)
        rank, world_size = rank + take(wanted, "rank_offset", int), take(wanted, "world_size", int)
        try:
            store = connect(address, port, world_size, self._timeout)
            self._group = join(store, self._name, self._backend, rank, world_size, self._timeout)
        except RuntimeError as error:  # torch's DistError is one
            raise RpcError(f"could not join group {self._name} at {address}:{port}: {first_line(error)}") from error

    def receive(self, specs: Sequence[TensorSpec], nbytes: int, device: torch.device) -> torch.Tensor:
        """A bucket of `nbytes` bytes with the next tensors that rank 0 broadcasts: one for each spec, in their order.

        It is in the host's memory with Gloo, and on the device with NCCL."""
        bucket = torch.empty(nbytes, dtype=torch.uint8, device="cpu" if self._backend == "gloo" else device)
        try:
            work = None
            for spec in specs:
                work = receive(self._group, view(bucket, spec))
                if self._backend == "gloo":
                    work.wait()
            if work is not None:
                wait(self._group, work, self._timeout)
        except RuntimeError as error:
            raise RpcError(f"group {self._name}: the broadcast did not come: {first_line(error)}") from error
        return bucket

    def close(self) -> None:
        self._group.shutdown()
