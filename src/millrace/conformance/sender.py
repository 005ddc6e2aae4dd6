"""A sender of weights over a process group of torch's: rank 0, as a trainer on another host would be."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from millrace.launch.ports import free_port


class Sender:
    """The group `name` of this process and `receivers` ranks of an engine, which meet at `address`, at `port`. The
    engine must join, and load, at the same time. Every wait ends after `deadline` seconds, by torch's own error."""

    def __init__(self, name: str, address: str, *, receivers: int, deadline: float) -> None:
        self.port = free_port(address)
        self._name, self._address, self._world = name, address, 1 + receivers
        self._deadline = timedelta(seconds=deadline)
        self._group: Any = None

    def join(self) -> None:
        """Blocks until all are there. The keys in the store are those that torch makes for a group of this name."""
        store: Any = dist.TCPStore(self._address, self.port, self._world, is_master=True, timeout=self._deadline)
        for prefix in (self._name, f"{self._name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self._group = dist.ProcessGroupGloo(store, 0, self._world, self._deadline)

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Blocks until every receiver has them."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for tensor in tensors:
            self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        if self._group is not None:
            self._group.shutdown()
