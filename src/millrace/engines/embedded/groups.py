"""Join a trainer's process group, to receive weights from it."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from millrace.engines.embedded.weights import UpdateRefused


class UpdateGroup:
    """This process's membership in a trainer's group, whose rank 0 broadcasts. Used by the loader thread only.

    The keys in the store are those that torch uses for a group of this name, so a trainer can join with torch itself,
    as users of SGLang do. Every wait ends after `timeout` seconds.
    """

    def __init__(
        self, address: str, port: int, *, rank: int, world_size: int, name: str, backend: str, timeout: float
    ) -> None:
        deadline = timedelta(seconds=timeout)
        try:
            store: Any = dist.TCPStore(address, port, world_size, is_master=False, timeout=deadline)
            prefixed = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
            if backend == "gloo":
                self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("cpu/", prefixed), rank, world_size, deadline)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = deadline
                self._group = dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", prefixed), rank, world_size, options)
        except RuntimeError as error:  # also torch's DistError
            raise UpdateRefused(f"could not join group {name} at {address}:{port}: {_first_line(error)}") from error
        self.name = name
        self._backend = backend

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill the tensor with the next broadcast of rank 0."""
        wire = tensor.cpu() if self._backend == "gloo" else tensor
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._group.broadcast([wire], options).wait()
        except RuntimeError as error:
            raise UpdateRefused(f"group {self.name}: no broadcast arrived: {_first_line(error)}") from error
        if wire is not tensor:
            tensor.copy_(wire)

    def close(self) -> None:
        self._group.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
