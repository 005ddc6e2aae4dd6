"""Weights that lie in shards over a trainer's ranks. A tensor is made whole when it is asked for, so that no rank ever
holds more than one of them; rank 0 asks, for a publish, and the others follow it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from millrace.model_folder import FLOATS
from millrace.weights.cast import Dtypes
from millrace.weights.finite import not_finite

END, CHECK = -1, -2  # in the place of a tensor's number
EARLY: tuple[torch.dtype | None, ...] = (None, *(getattr(torch, name) for name in FLOATS.values()))  # casts by number


@dataclass(frozen=True, slots=True)
class ShardedTensors:
    """A model's tensors by name, in an order that is the same on all ranks: DTensors in any placement (FSDP2, tensor
    parallel, both) or plain tensors that every rank has whole.

    A shard that no DTensor describes becomes one by `DTensor.from_local(shard, mesh, [Shard(dim)])`.

    It can be gone through again. Going through it is collective: all ranks do it, to the end.
    """

    tensors: Mapping[str, Tensor]

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Of the whole tensors, by name; gathers nothing."""
        return [(name, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors:
            yield name, self.whole(name)

    def whole(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Collective; all ranks name the same. On the device of its shards, cast to `dtype` where one is given. The
        weight itself where it is neither sharded nor cast."""
        tensor = self.tensors[name].detach()
        if dtype is not None:
            tensor = tensor.to(dtype)  # first: fewer bytes to gather
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class LedTensors:
    """What rank 0 publishes while the others `follow`: it may go through it as often and as far as it likes. With
    `dtypes`, matrices are cast before they are gathered; what is smaller is left to the publish."""

    sharded: ShardedTensors
    dtypes: Dtypes | None = None

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return self.sharded.shapes()

    def not_finite(self, dtypes: Dtypes) -> list[str]:
        """Return the names of the tensors that have a NaN or an infinite value. All ranks check their own shards."""
        _tell(self.sharded, CHECK, torch.float16 if dtypes.usual == "float16" else None)
        return _not_finite(self.sharded, Dtypes(dtypes.usual, {}))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # Names are the trainer's here: where tensors of the checkpoint have a dtype of their own, none is cast early.
        dtypes = self.dtypes if self.dtypes is not None and not self.dtypes.unusual else None
        for number, (name, tensor) in enumerate(self.sharded.tensors.items()):
            early = isinstance(tensor, DTensor) and tensor.ndim > 1
            dtype = dtypes.cast_to(name, tensor.dtype) if early and dtypes is not None else None
            _tell(self.sharded, number, dtype)
            yield name, self.sharded.whole(name, dtype)


@contextmanager
def leading(sharded: ShardedTensors, dtypes: Dtypes | None = None) -> Iterator[LedTensors]:
    """On rank 0 of the default process group, while every other rank is in `follow`; at its end, they are let go.
    `dtypes` are the engines' (`Fleet.dtypes`)."""
    try:
        yield LedTensors(sharded, dtypes)
    finally:
        _tell(sharded, END)


def follow(sharded: ShardedTensors) -> None:
    """On every rank but 0: takes part in making whole what rank 0 asks for, until that is done with it. A rank that
    waits longer than the process group's timeout is raised out of it, as out of every collective."""
    names = list(sharded.tensors)
    while (told := _tell(sharded, END))[0] != END:
        number, dtype = told
        if number == CHECK:
            _not_finite(sharded, Dtypes(None if dtype is None else str(dtype).removeprefix("torch."), {}))
        else:
            sharded.whole(names[number], dtype)


def _not_finite(sharded: ShardedTensors, dtypes: Dtypes) -> list[str]:
    """Return the names of the tensors that have a NaN or an infinite value after the cast to `dtypes`.

    Collective. Each rank checks its own shards, and nothing is gathered."""
    shards = [(name, t.to_local() if isinstance(t, DTensor) else t) for name, t in sharded.tensors.items()]
    bad = frozenset(not_finite(shards, dtypes))
    found = torch.tensor([name in bad for name in sharded.tensors], dtype=torch.uint8, device=_on_device(sharded))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [name for name, one in zip(sharded.tensors, found.tolist(), strict=True) if one]


def _tell(sharded: ShardedTensors, number: int, dtype: torch.dtype | None = None) -> tuple[int, torch.dtype | None]:
    """What rank 0 says, on every rank."""
    told = torch.tensor((number, EARLY.index(dtype)), device=_on_device(sharded))
    dist.broadcast(told, src=0)
    number, index = told.tolist()
    return number, EARLY[index]


def _on_device(sharded: ShardedTensors) -> torch.device:
    """The tensors' device, current from here on: a publish goes on in threads of its own, and CUDA's current device is
    each thread's."""
    device = next(iter(sharded.tensors.values())).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
