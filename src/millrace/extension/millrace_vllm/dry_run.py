"""A dry run of a model's `load_weights`: it records which elements would be written and where they come from, and
writes none."""

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from .messages import FLOATS, TensorSpec

Owners = dict[int, tuple[str, str, torch.Tensor]]  # storage -> the module's path, the tensor's name in it, the tensor
COPY, FILL, ITEM = torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten._local_scalar_dense.default


class Region(NamedTuple):
    """Elements of a tensor in a module. `offset` counts elements in the tensor's storage."""

    name: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)


class View(NamedTuple):
    """The elements of a sent tensor that are copied into a region, in the region's shape. `offset` counts elements."""

    offset: int
    strides: tuple[int, ...]


Origins = dict[Region, View | float]  # where a region's elements come from; a number fills the whole region


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, a write into one of the `owners` is recorded in `writes` and not carried out."""

    def __init__(self, owners: Owners) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self._sources: dict[int, tuple[TensorSpec, torch.Tensor]] = {}  # the tensor keeps the storage's address in use
        self.current: TensorSpec | None = None
        self.writes: dict[str, dict[str, tuple[torch.dtype, Origins]]] = {}  # sent name -> module -> regions
        self.unplanned: dict[str, str] = {}  # sent name -> why copies and fills alone do not load it

    def announce(self, specs: list[TensorSpec], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor of zeros in the shape of each spec, without memory. Floats have the model's `dtype`, because vLLM
        logs every cast."""
        dtypes = [dtype if spec.dtype in FLOATS else spec.dtype for spec in specs]
        nbytes = max((math.prod(s.shape) * d.itemsize for s, d in zip(specs, dtypes, strict=True)), default=0)
        # Pages that are only read have no memory of their own.
        zeros = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for spec, kind in zip(specs, dtypes, strict=True):
            count = math.prod(spec.shape)
            flat = torch.frombuffer(zeros, dtype=kind, count=count) if count else torch.empty(0, dtype=kind)
            source = flat.view(spec.shape)
            self._sources[storage_id(source)], self.current = (spec, source), spec
            yield spec.name, source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        spec = self.current
        first = storage_id(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        owner = self._owners.get(first) if first is not None else None
        if owner is None or func not in (COPY, FILL):
            changes = func._schema.is_mutable and (owner is not None or first in self._sources)
            if spec is not None and (changes or func is ITEM):
                self.unplanned[spec.name] = f"the loader calls {func}"
            return func(*args, **(kwargs or {}))
        assert spec is not None
        into: torch.Tensor = args[0]
        path, name, tensor = owner
        if not into.numel() or (func is FILL and into.numel() == tensor.numel() > 1):
            return into  # a loader that clears a whole tensor has not loaded anything
        whole = None
        if func is COPY:
            spec, whole = self._sources.get(storage_id(args[1]), (spec, None))
            if args[1].numel() != into.numel():
                raise ValueError(f"{list(args[1].shape)} would be spread over {list(into.shape)}")
            if spec.dtype.is_floating_point != into.dtype.is_floating_point:
                raise ValueError(f"the model keeps {into.dtype}")
        _, origins = self.writes.setdefault(spec.name, {}).setdefault(path, (into.dtype, {}))
        region = Region(name, int(into.storage_offset()), tuple(into.shape), tuple(into.stride()))
        if func is FILL:
            origins[region] = float(args[1])
        elif whole is None or args[1].dtype is not whole.dtype or tuple(args[1].shape) != region.sizes:
            origins[region] = 0.0
            self.unplanned[spec.name] = "the loader computes what it copies"
        else:
            origins[region] = View(int(args[1].storage_offset()), tuple(args[1].stride()))
        return into


def twin_of(tensor: torch.Tensor, module: torch.nn.Module) -> Any:
    """A tensor with the same shape and loader, but without memory."""
    twin: Any = restore_layer_refs(to_meta_tensor(tensor), module)
    if hasattr(twin, "weight_loader"):
        loader = twin.weight_loader
        while loader.__name__ == "online_process_loader":  # vLLM's reload wraps the module's own loader
            loader = loader.__wrapped__
        twin.weight_loader = loader
    return twin


@contextmanager
def without_loras(model: torch.nn.Module) -> Iterator[None]:
    """Remove vLLM's LoRA wrappers from the model while the block runs. They rename parameters, and the loaders of vLLM
    before 0.32 do not know these names."""
    wrapped = [
        (parent._modules, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for children, name, child in wrapped:
        children[name] = child.base_layer
    try:
        yield
    finally:
        for children, name, child in wrapped:
            children[name] = child


def storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
