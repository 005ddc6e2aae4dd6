"""A dry run of a model's `load_weights`: it records which elements would be written, and writes none."""

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


class Region(NamedTuple):
    """Elements of a tensor in a module. `offset` counts elements in the tensor's storage."""

    name: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, a write into one of the `owners` is recorded in `writes` and not carried out."""

    def __init__(self, owners: Owners) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self._sources: dict[int, TensorSpec] = {}
        self._alive: list[torch.Tensor] = []  # so that torch does not reuse the address of a storage
        self.current: TensorSpec | None = None
        self.writes: dict[str, dict[str, tuple[torch.dtype, dict[Region, int]]]] = {}  # sent name -> module -> regions

    def announce(self, specs: list[TensorSpec], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor of the shape of each spec, with memory for one element. Floats have the model's `dtype`, because
        vLLM logs every cast."""
        for spec in specs:
            source = torch.zeros((), dtype=dtype if spec.dtype in FLOATS else spec.dtype).expand(spec.shape)
            self._sources[storage_id(source)] = self.current = spec
            self._alive.append(source)
            yield spec.name, source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        copies, fills = func is torch.ops.aten.copy_.default, func is torch.ops.aten.fill_.Scalar
        owner = self._owners.get(storage_id(args[0])) if copies or fills else None
        if owner is None:
            return func(*args, **(kwargs or {}))
        into: torch.Tensor = args[0]
        path, name, tensor = owner
        if not into.numel() or (fills and into.numel() == tensor.numel() > 1):
            return into  # a loader that clears a whole tensor has not loaded anything
        spec = self._sources.get(storage_id(args[1]), self.current) if copies else self.current
        assert spec is not None
        if copies and args[1].numel() != into.numel():
            raise ValueError(f"{list(args[1].shape)} would be spread over {list(into.shape)}")
        if copies and spec.dtype.is_floating_point != into.dtype.is_floating_point:
            raise ValueError(f"the model keeps {into.dtype}")
        _, regions = self.writes.setdefault(spec.name, {}).setdefault(path, (into.dtype, {}))
        region = Region(name, int(into.storage_offset()), tuple(into.shape), tuple(into.stride()))
        regions[region] = into.numel()
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
