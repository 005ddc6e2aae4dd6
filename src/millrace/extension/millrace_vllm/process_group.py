"""Tensors that a sender broadcasts to a torch process group, over Gloo or NCCL."""

from typing import Any

import torch
from millrace_group import connect, join, receive, wait
from millrace_words import first_line

from .errors import RpcError
from .messages import TensorSpec, take


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

    def receive(self, specs: list[TensorSpec], device: torch.device) -> list[torch.Tensor]:
        """The next tensors that rank 0 broadcasts: one for each spec, in their order."""
        place = torch.device("cpu") if self._backend == "gloo" else device
        tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=place) for spec in specs]
        try:
            work = None
            for tensor in tensors:
                work = receive(self._group, tensor)
                if self._backend == "gloo":
                    work.wait()
            if work is not None:
                wait(self._group, work, self._timeout)
        except RuntimeError as error:
            raise RpcError(f"group {self._name}: the broadcast did not come: {first_line(error)}") from error
        return tensors

    def close(self) -> None:
        self._group.shutdown()
