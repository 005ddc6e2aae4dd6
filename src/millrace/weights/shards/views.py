"""Which boxes of a trainer's tensors the checkpoint's tensors are.

Between the trainer and the engines, tensors are renamed, fused ones are split, and all are cast. The same conversion is
run here on tensors of the meta device, which have a shape and no content.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.extension.millrace_boxes import Box, box_of, whole
from millrace.weights.shards.schedule import ShardedView
from millrace.weights.source import WeightSource

CAST = torch.ops.aten._to_copy.default


class NotExchangeable(Exception):
    """The tensors must be gathered. The message says why."""


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers, while it is active, what each cast tensor was cast from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: dict[int, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []  # another tensor would get the memory's number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is CAST and args[0].is_meta:
            self.origins[_memory(result)] = args[0]
            self._kept.append(result)
        return result


def metas(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes and dtypes on the meta device. Names of one tensor get the same tensor."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = local.data_ptr() if local.numel() else -len(made) - 1, tensor.shape
        found[name] = made.setdefault(key, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    return found


def views_of(source: WeightSource, tensors: Mapping[str, torch.Tensor]) -> list[ShardedView]:
    """Return the tensors of `source` as boxes of the trainer's tensors. Nothing is gathered or computed.

    Raises NotExchangeable if one is not, and PublishError as iterating over the source does.
    """
    given = metas(tensors)
    order = {_memory(tensor): index for index, tensor in reversed(list(enumerate(given.values())))}
    shapes = [tensor.shape for tensor in given.values()]
    casts = _Casts()
    found = []
    try:
        with casts:
            converted = list(source.convert(iter(given.items())))
    except RuntimeError as error:  # tensors of the meta device have none
        raise NotExchangeable(f"the conversion to the checkpoint reads the tensors' values: {error}") from error
    for name, tensor in converted:
        view = casts.origins.get(_memory(tensor), tensor)
        if _memory(view) not in order or view.shape != tensor.shape:
            raise NotExchangeable(f"{name} is no part of one of the trainer's tensors")
        index = order[_memory(view)]
        box = box_of(shapes[index], int(view.storage_offset()), view.shape, view.stride())
        if box is None:
            raise NotExchangeable(f"{name} is no rectangular part of the trainer's tensor")
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(ShardedView(name, dtype, tensor.dtype.itemsize, index, *box))
    return found


def own_boxes(tensors: Mapping[str, torch.Tensor]) -> list[Box | None]:
    """Return the box of each tensor that this rank has; None if it has nothing of it.

    Raises NotExchangeable if a rank's part is no box.
    """
    return [_own_box(name, tensor) for name, tensor in tensors.items()]


def _own_box(name: str, tensor: torch.Tensor) -> Box | None:
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape) if tensor.numel() else None
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise NotExchangeable(f"{name} is the sum of its shards (Partial)")
    if tensor.device_mesh.get_coordinate() is None:
        return None
    shape, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if tuple(local.shape) != tuple(shape):
        raise NotExchangeable(f"rank {dist.get_rank()} has {tuple(local.shape)} of {name}, and not {tuple(shape)}")
    if not local.numel():
        return None
    return tuple((start, start + size) for start, size in zip(starts, shape, strict=True))


def local_piece(tensor: torch.Tensor, owned: Box, view: ShardedView, box: Box) -> torch.Tensor:
    """Return the elements of this rank's shard that are the box `box` of a view, in the view's shape. Copies nothing.

    tensor: the shard. owned: its box in the trainer's tensor.
    """
    wanted = view.to_source(box)
    strides, sizes = tensor.stride(), [end - start for start, end in box]
    ahead = sum((w[0] - o[0]) * step for w, o, step in zip(wanted, owned, strides, strict=True))
    steps = [1 if dim is None else strides[dim] for dim in view.along]
    return tensor.as_strided(sizes, steps, int(tensor.storage_offset()) + ahead)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def shards_of(tensors: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return this rank's shards, in the tensors' order."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
