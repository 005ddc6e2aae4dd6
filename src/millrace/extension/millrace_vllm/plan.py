"""Where each element of a sent tensor goes in this rank's model."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from millrace_words import first_line, listed
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from .dry_run import Origins, Owners, Recorder, storage_id, twin_of, without_loras
from .errors import RpcError
from .messages import FLOATS, TensorSpec

UNRECORDED = {"bias", "e_score_correction_bias"}  # of a checkpoint, and yet vLLM does not record them (0.32)

log = logging.getLogger("vllm.millrace")


@dataclass(frozen=True, slots=True)
class Target:
    """The elements of this rank's model that a sent tensor fills.

    module: None if this rank does not use the tensor. dtype: the dtype that the tensor is cast to. regions: of the
    module, and where their elements come from. shared: the name of the parameter if several modules have it in common,
    as lm_head and embed_tokens can. unplanned: why the model's own loader must load the tensor; None if the elements
    need only be copied."""

    module: str | None
    dtype: torch.dtype
    regions: Origins = field(default_factory=dict)
    shared: str | None = None
    unplanned: str | None = None


class Plan:
    """The targets of a trainer's tensors. The plan finds each target by a dry run when the tensor first arrives, and
    keeps it."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, shards: int) -> None:
        self._model, self._dtype, self._shards = model, dtype, shards
        self.modules = dict(model.named_modules())
        self.needed: dict[str, dict[str, int]] = {}  # module -> parameter -> elements that make it complete
        self.forms: dict[tuple[str, str], torch.Tensor] = {}  # without memory, as a checkpoint fills them
        self._targets: dict[tuple[str, torch.dtype, tuple[int, ...]], Target] = {}
        holders: dict[int, list[tuple[str, str]]] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((path, name))
        self._shared = {holder: group for group in holders.values() if len(group) > 1 for holder in group}

    def targets(self, specs: Sequence[TensorSpec]) -> list[Target]:
        """The target of each tensor. Raises RpcError if the model cannot load one of them."""
        unknown = [spec for spec in specs if (spec.name, spec.dtype, spec.shape) not in self._targets]
        if unknown:
            self._learn(unknown)
        return [self._targets[spec.name, spec.dtype, spec.shape] for spec in specs]

    def sharers(self, path: str) -> set[str]:
        """The other modules that have a parameter in common with this module."""
        groups = (group for (holder, _), group in self._shared.items() if holder == path)
        return {holder for group in groups for holder, _ in group if holder != path}

    def _learn(self, specs: list[TensorSpec]) -> None:
        with self._twin() as owners, without_loras(self._model), Recorder(owners) as recorder:
            try:
                self._model.load_weights(recorder.announce(specs, self._dtype))  # type: ignore[operator]
            except (ValueError, KeyError, IndexError, AttributeError, AssertionError, TypeError, RuntimeError) as error:
                # The loaders of some hundred models raise any of these for a tensor that they do not know.
                reason = first_line(error).partition(". The available parameters")[0] or type(error).__name__
                raise RpcError(f"{recorder.current} does not fit the model: {reason}") from error
        self.forms.update({(path, name): twin for path, name, twin in owners.values()})
        found = {spec: self._target(spec, recorder) for spec in specs}
        if unplanned := {spec.name: target.unplanned for spec, target in found.items() if target.unplanned}:
            reasons = ", ".join(sorted(set(unplanned.values())))
            log.warning("the model's own loader loads %s each time: %s", listed(unplanned), reasons)
        self._targets.update({(spec.name, spec.dtype, spec.shape): target for spec, target in found.items()})

    def _target(self, spec: TensorSpec, recorder: Recorder) -> Target:
        writes = recorder.writes.get(spec.name)
        if not writes:
            return Target(None, spec.dtype)
        if len(writes) > 1:
            raise RpcError(f"{spec} belongs to several modules ({listed(writes)}); such a tensor cannot be loaded")
        [(path, (dtype, regions))] = writes.items()
        embedding = isinstance(self.modules[path], VocabParallelEmbedding)
        if not embedding and sum(region.elements for region in regions) * self._shards < math.prod(spec.shape):
            raise RpcError(f"{spec} is larger than what {path} takes of it")  # vLLM's loaders would cut it silently
        group = self._shared.get((path, next(iter(regions)).name))
        shared = ".".join(group[0]) if group else None
        if embedding and group and group[0][0] != path:
            return Target(None, spec.dtype, shared=shared)  # vLLM loads it under the first name only
        kept = dtype if dtype in FLOATS and spec.dtype in FLOATS else spec.dtype
        return Target(path, kept, regions, shared, recorder.unplanned.get(spec.name))

    @contextmanager
    def _twin(self) -> Iterator[Owners]:
        """Replace the model's tensors by tensors without memory while the block runs. The twins have the shapes that a
        checkpoint fills."""
        owners: Owners = {}
        saved = [(m, dict(m._parameters), dict(m._buffers)) for m in self.modules.values()]
        try:
            for path, module in self.modules.items():
                recorded = get_layerwise_info(module).restore_metadata
                for kept, loaded in zip((module._parameters, module._buffers), recorded, strict=True):
                    for name, tensor in {**kept, **loaded}.items():
                        if tensor is not None:
                            kept[name] = twin = twin_of(tensor, module)
                            if name == "bias" and name not in loaded and recorded[0].get("weight") is not None:
                                # vLLM widens the biases of packed layers to float32 (on CPUs with AMX).
                                of_weight = recorded[0]["weight"].dtype
                                twin.data = twin.data.to(of_weight if of_weight in FLOATS else self._dtype)
                            owners[storage_id(twin)] = (path, name, twin)
                # vLLM has computed the parameters that it did not record, such as scales, from the weights.
                made = module._parameters.keys() - recorded[0].keys() - UNRECORDED if recorded[0] else set()
                self.needed[path] = {
                    # weight_loader_numel: set by vLLM if a checkpoint does not contain all elements
                    name: vars(parameter).get("weight_loader_numel", parameter.numel())
                    for name, parameter in module._parameters.items()
                    if parameter is not None and name not in made and self._is_needed(path, name)
                }
            yield owners
        finally:
            for module, parameters, buffers in saved:
                for kept, before in ((module._parameters, parameters), (module._buffers, buffers)):
                    kept.clear()
                    kept.update(before)

    def _is_needed(self, path: str, name: str) -> bool:
        """Whether an update must fill this parameter in this module. vLLM loads a shared parameter into one of its
        modules: an embedding into the first. For other modules the choice is not known, so none of them needs it."""
        group = self._shared.get((path, name))
        return group is None or (isinstance(self.modules[path], VocabParallelEmbedding) and group[0][0] == path)
