"""One rank of the server: its weights, and the transports that bring buckets to it."""

from pathlib import Path
from typing import Any

import torch

from .digest import StoredTensors
from .errors import RpcError
from .messages import TensorSpec, parse_spec, take
from .plan import Plan
from .process_group import ReceivingGroup
from .receive import mapped_file, opened_ipc, read_folder, views
from .weights import Weights
from .writing import Writer


class Rank:
    """The state that the extension keeps in one worker."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device, rank: int) -> None:
        parallel = config.parallel_config
        shards = parallel.tensor_parallel_size * parallel.data_parallel_size
        plan = Plan(model, config.model_config.dtype, shards)
        self.rank = parallel.data_parallel_index * parallel.world_size + rank
        self.weights = Weights(plan, Writer(model, config, device, plan))
        self.stored = StoredTensors(plan.modules)
        self._device = device
        self._groups: dict[str, ReceivingGroup] = {}

    def join(self, group: dict[str, Any]) -> None:
        name = take(group, "name", str)
        if name in self._groups:
            raise RpcError(f"group {name} is joined already; leave it first")
        self._groups[name] = ReceivingGroup(group, self.rank)

    def leave(self, name: str) -> None:
        if name not in self._groups:
            raise RpcError(f"no group {name} has been joined")
        self._groups.pop(name).close()

    def load(self, bucket: dict[str, Any]) -> list[str]:
        """Load a bucket. Returns the names that this rank does not use."""
        kind = take(bucket, "kind", str)
        if kind == "disk":
            tensors = read_folder(Path(take(bucket, "path", str)))
            specs = [TensorSpec(name, t.dtype, tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()]
            return self.weights.load(specs, lambda: list(tensors.values()))
        if kind not in ("shared_memory", "cuda_ipc", "process_group"):
            raise RpcError(f"unknown kind of bucket: {kind}")
        specs = [parse_spec(tensor) for tensor in take(bucket, "tensors", list)]
        if kind == "shared_memory":
            path = take(bucket, "path", str)
            return self.weights.load(specs, lambda: views(mapped_file(path), specs))
        if kind == "cuda_ipc":
            shares, nbytes = take(bucket, "shares", list), take(bucket, "nbytes", int)
            if self.rank >= len(shares) or not isinstance(shares[self.rank], dict):
                raise RpcError(f"the bucket has {len(shares)} shares, and none for rank {self.rank}")
            return self.weights.load(specs, lambda: views(opened_ipc(shares[self.rank], nbytes, self._device), specs))
        name = take(bucket, "group", str)
        if name not in self._groups:
            raise RpcError(f"no group {name} has been joined; join it first")
        return self.weights.load(specs, lambda: self._groups[name].receive(specs, self._device))
