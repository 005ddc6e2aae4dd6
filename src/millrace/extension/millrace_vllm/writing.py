"""Writes tensors into this rank's model, in place or through vLLM's layer-wise reload."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from .dry_run import without_loras
from .plan import Plan


class Part(NamedTuple):
    """A sent tensor that fills a module or a part of one."""

    name: str  # the sender's
    tensor: torch.Tensor
    dtype: torch.dtype  # the model's


class Writer:
    """Loads parts into the model, and lets vLLM process the modules that need it."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device, plan: Plan) -> None:
        self._model, self._config, self._device, self._plan = model, config, device, plan
        # Attention. vLLM processes it after all other modules, because MLA reads their weights.
        self.processed_last = {
            path for path, module in plan.modules.items() if hasattr(module, "process_weights_after_loading")
        }

    def in_place(self, path: str) -> bool:
        """Whether a module uses its tensors as they were loaded, so that they can be written in place."""
        module = self._plan.modules[path]
        if path in self.processed_last:
            return False
        if not hasattr(module, "quant_method") or module.quant_method is None:
            return True
        plain = type(module.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        return plain and self._device.type == "cuda"

    def write(self, complete: set[str], parts: list[Part]) -> None:
        """Load `parts`. The modules in `complete` go through vLLM's reload, all others are written in place."""
        modules = [self._plan.modules[path] for path in complete]
        chosen = Only(modules)
        try:
            with set_current_vllm_config(self._config), torch.no_grad(), self._without_kernels(modules):
                initialize_layerwise_reload(chosen)
                try:
                    if parts:
                        weights = ((part.name, part.tensor.to(part.dtype)) for part in parts)
                        with without_loras(self._model):
                            self._model.load_weights(weights)  # type: ignore[operator]
                except BaseException:
                    for info in map(get_layerwise_info, modules):  # they get their old memory and its content back
                        info.load_numel = 0
                        info.loaded_weights.clear()
                    raise
                finally:
                    finalize_layerwise_reload(chosen, self._config.model_config)
                for sharer in {self._plan.modules[other] for path in complete for other in self._plan.sharers(path)}:
                    if hasattr(sharer, "quant_method"):  # on the CPU, a tied lm_head has a packed copy of its own
                        sharer.quant_method.process_weights_after_loading(sharer)
        finally:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)  # after this, nothing reads the bucket's memory

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


class Only(torch.nn.Module):
    """Stands for a model with only these modules, so that vLLM's reload visits no others."""

    def __init__(self, chosen: list[torch.nn.Module]) -> None:
        super().__init__()
        self._chosen = tuple(chosen)  # a tuple, so that torch does not register them as children

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:  # noqa: ARG002
        yield from self._chosen
