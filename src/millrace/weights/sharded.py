"""Weights that lie in shards over a trainer's ranks. A tensor is made whole when it is asked for, so that no rank ever
holds more than one of them; rank 0 asks, for a publish, and the others follow it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

END = -1  # in the place of a tensor's number


@dataclass(frozen=True, slots=True)
class ShardedTensors:
    """A model's tensors by name, in an order that is the same on all ranks: DTensors in any placement (FSDP2, tensor
    parallel, both) or plain tensors that every rank has whole. What comes out is of `dtype`, where one is given.

    A shard that no DTensor describes becomes one by `DTensor.from_local(shard, mesh, [Shard(dim)])`.

    It can be gone through again. Going through it is collective: all ranks do it, to the end.
    """

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype | None = None

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Of the whole tensors, by name; gathers nothing."""
        return [(name, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors:
            yield name, self.whole(name)

    def whole(self, name: str) -> Tensor:
        """Collective. On the device of its shards; the weight itself where it is neither sharded nor cast."""
        tensor = self.tensors[name].detach()
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)  # first: fewer bytes to gather
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class LedTensors:
    """What rank 0 publishes while the others `follow`: it may go through it as often and as far as it likes."""

    sharded: ShardedTensors

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return self.sharded.shapes()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for number, name in enumerate(self.sharded.tensors):
            _tell(self.sharded, number)
            yield name, self.sharded.whole(name)


@contextmanager
def leading(sharded: ShardedTensors) -> Iterator[LedTensors]:
    """On rank 0 of the default process group, while every other rank is in `follow`; at its end, they are let go."""
    try:
        yield LedTensors(sharded)
    finally:
        _tell(sharded, END)


def follow(sharded: ShardedTensors) -> None:
    """On every rank but 0: takes part in making whole what rank 0 asks for, until that is done with it. A rank that
    waits longer than the process group's timeout is raised out of it, as out of every collective."""
    names = list(sharded.tensors)
    while (number := _tell(sharded, END)) != END:
        sharded.whole(names[number])


def _tell(sharded: ShardedTensors, number: int) -> int:
    """Rank 0's number, on every rank."""
    told = torch.tensor(number, device=_on_device(sharded))
    dist.broadcast(told, src=0)
    return int(told.item())


def _on_device(sharded: ShardedTensors) -> torch.device:
    """The tensors' device, current from here on: a publish goes on in threads of its own, and CUDA's current device is
    each thread's."""
    device = next(iter(sharded.tensors.values())).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
