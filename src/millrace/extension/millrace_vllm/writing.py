"""Writes into this rank's model: by copies, and by vLLM's layer-wise reload and the model's own loader if needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
from millrace_copies import Fused, copy_out
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.v1.attention.backend import AttentionImplBase

from .dry_run import Region, without_loras
from .layouts import Writes, region_of
from .plan import Plan

UNQUANTISED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
UNCONVERTED = ("TRITON", "BATCHED_TRITON")  # kernels that use the experts of a checkpoint as they are


class Sent(NamedTuple):
    """A sent tensor that the model's own loader must load."""

    name: str  # the sender's
    tensor: torch.Tensor  # in the model's dtype


@dataclass(slots=True)
class Staged:
    """The parts of a module that have arrived: its tensors as a checkpoint fills them, and what must still be loaded.

    regions: those that have arrived."""

    regions: set[Region]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: list[Sent] = field(default_factory=list)


class Writer:
    """Writes into the model, and lets vLLM process the modules that need it."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device, plan: Plan) -> None:
        self._model, self._config, self._device, self._plan = model, config, device, plan
        # Attention. vLLM processes it after all other modules, because MLA reads their weights.
        self.processed_last = {
            path for path, module in plan.modules.items() if hasattr(module, "process_weights_after_loading")
        }
        self.inert = {
            path for path in self.processed_last if is_inert(plan.modules[path])
        }  # if nothing is sent to them
        self._in_place: dict[str, bool] = {}
        self._scales: dict[torch.nn.Module, torch.Tensor] = {}  # that kernels on the CPU have the addresses of

    def in_place(self, path: str) -> bool:
        """Whether a module uses its tensors as they were loaded, so that they can be written in place."""
        if path not in self._in_place:
            self._in_place[path] = path not in self.processed_last and self._uses_as_loaded(self._plan.modules[path])
        return self._in_place[path]

    def _uses_as_loaded(self, module: torch.nn.Module) -> bool:
        method = getattr(module, "quant_method", None)
        if method is None:
            return True
        if self._device.type == "cpu":
            return type(method) in UNQUANTISED and keeps_no_copy(module) and self._has_loaded_form(module)
        if self._device.type != "cuda":
            return False
        if type(method) is UnquantizedFusedMoEMethod:
            return method.unquantized_backend.name in UNCONVERTED and self._has_loaded_form(module)
        return type(method) in UNQUANTISED

    def _has_loaded_form(self, module: torch.nn.Module) -> bool:
        """Whether a module's parameters have the shapes, strides and dtypes that a checkpoint fills."""
        loaded = get_layerwise_info(module).restore_metadata[0]
        return bool(loaded) and all(
            (now := module._parameters.get(name)) is not None
            and (now.shape, now.stride(), now.dtype) == (before.shape, before.stride(), before.dtype)
            for name, before in loaded.items()
        )

    def stage(self, path: str, staged: Staged, writes: Writes, bucket: torch.Tensor) -> None:
        """Write parts of a module into memory beside the model, from where `process` takes them."""
        for name in writes.copies.keys() | {region.name for region, _ in writes.fills}:
            if name not in staged.tensors:
                form = self._plan.forms[path, name]
                staged.tensors[name] = torch.empty_strided(
                    form.shape, form.stride(), dtype=form.dtype, device=self._device
                )
        for name, copies in writes.copies.items():
            into = staged.tensors[name]
            for targets, sources in copies:
                here = [into.as_strided(target.shape, target.stride(), target.storage_offset()) for target in targets]
                copy_out(bucket, [Fused(here, sources)])
        for region, value in writes.fills:
            region_of(staged.tensors[region.name], region).fill_(value)

    def load(self, parts: Sequence[Sent]) -> None:
        """Let the model's own loader load tensors in place."""
        if parts:
            with set_current_vllm_config(self._config), torch.no_grad(), without_loras(self._model):
                self._model.load_weights(parts)  # type: ignore[operator]

    def process(self, staged: Mapping[str, Staged]) -> None:
        """Let vLLM load and process modules of which all parts have arrived.

        Modules without parts go through one at a time, so that no more memory is needed than for one."""
        alone = [path for path, one in staged.items() if not one.parts and one.tensors]
        together = staged.keys() - set(alone)
        for some in (*({path: staged[path]} for path in alone), {path: staged[path] for path in together}):
            if some:
                self._process(some)
                for one in some.values():
                    one.tensors.clear()

    def _process(self, staged: Mapping[str, Staged]) -> None:
        modules = [self._plan.modules[path] for path in staged]
        parts = [part for one in staged.values() for part in one.parts]
        chosen = Only(modules)
        with (
            set_current_vllm_config(self._config),
            torch.no_grad(),
            self._without_kernels(modules),
            self._keeping_scales(modules),
        ):
            initialize_layerwise_reload(chosen)
            try:
                if parts:
                    with without_loras(self._model):
                        self._model.load_weights(parts)  # type: ignore[operator]
                for module, one in zip(modules, staged.values(), strict=True):
                    if one.tensors:
                        place(module, one)
                        _layerwise_process(module, get_layerwise_info(module))
            except BaseException:
                for info in map(get_layerwise_info, modules):  # they get their old memory and its content back
                    info.load_numel = 0
                    info.loaded_weights.clear()
                raise
            finally:
                finalize_layerwise_reload(chosen, self._config.model_config)
            for sharer in {self._plan.modules[other] for path in staged for other in self._plan.sharers(path)}:
                if hasattr(sharer, "quant_method"):  # on the CPU, a tied lm_head has a packed copy of its own
                    sharer.quant_method.process_weights_after_loading(sharer)

    def synchronize(self) -> None:
        """Wait until nothing reads a bucket's memory any more."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    @contextmanager
    def _keeping_scales(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """Keep the scales that int8 layers are processed with on the CPU. oneDNN's kernel reads them at their address
        (CPUInt8ScaledMMLinearKernel without AMX), and vLLM's reload frees them when it has copied them."""
        scaled = [module for module in modules if self._device.type == "cpu" and hasattr(module, "weight_scale")]
        methods: set[Any] = {module.quant_method for module in scaled}

        def processed_by(method: Any) -> Callable[[torch.nn.Module], None]:
            process = method.process_weights_after_loading

            def keeping(module: torch.nn.Module) -> None:
                process(module)
                scale = getattr(module, "weight_scale", None)
                if isinstance(scale, torch.Tensor):
                    self._scales[module] = scale

            return keeping

        for method in methods:
            method.process_weights_after_loading = processed_by(method)
        try:
            yield
        finally:
            for method in methods:
                del method.process_weights_after_loading  # the class's own is visible again

    @contextmanager
    def _without_kernels(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """Remove the kernels of experts on the CPU while vLLM loads them. vLLM packs experts only if they have no
        kernel; with one, a reload would leave them unpacked. After an error they get the old kernels back."""
        methods = [module.quant_method for module in modules if hasattr(module, "quant_method")]
        kernels = [(m, m.moe_kernel) for m in methods if self._device.type == "cpu" and hasattr(m, "moe_kernel")]
        for method, _ in kernels:
            method.moe_kernel = None
        try:
            yield
        except BaseException:
            for method, kernel in kernels:
                method.moe_kernel = kernel
            raise


def place(module: torch.nn.Module, staged: Staged) -> None:
    """Make staged tensors those of a module that vLLM reloads. Tensors that vLLM does not replace are written."""
    for name, tensor in staged.tensors.items():
        before = getattr(module, name)
        if before.is_meta:
            tensor.__class__, tensor.__dict__ = before.__class__, before.__dict__.copy()
            setattr(module, name, tensor)
            continue
        for region in staged.regions:
            if region.name == name:
                region_of(before, region).copy_(region_of(tensor, region))


def keeps_no_copy(module: torch.nn.Module) -> bool:
    """Whether the function by which vLLM multiplies on the CPU uses the layer's own weight, and has no packed copy."""
    multiply = vars(module).get("cpu_linear")
    if isinstance(multiply, FunctionType):
        return multiply.__closure__ is None and multiply.__defaults__ is None
    return multiply is torch.nn.functional.linear


def is_inert(module: torch.nn.Module) -> bool:
    """Whether vLLM's processing of an attention module reads no weights and only sets constants again."""
    nothing: Any = AttentionImplBase.process_weights_after_loading
    return type(module) is Attention and getattr(type(module.impl), nothing.__name__) is nothing


class Only(torch.nn.Module):
    """Stands for a model with only these modules, so that vLLM's reload visits no others."""

    def __init__(self, chosen: list[torch.nn.Module]) -> None:
        super().__init__()
        self._chosen = tuple(chosen)  # a tuple, so that torch does not register them as children

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:  # noqa: ARG002
        yield from self._chosen
