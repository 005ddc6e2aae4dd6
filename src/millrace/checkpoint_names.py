"""The map from a model's tensors in memory to the tensors of its checkpoint.

transformers renames and fuses tensors when it loads a model: the experts of a layer become one tensor,
`mlp.experts.gate_up_proj`, while the checkpoint has `mlp.experts.0.gate_proj.weight` and so on. The map comes from the
conversion tables of transformers that `from_pretrained` and `save_pretrained` use. Stock engines know the checkpoint's
names only.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    rename_source_key,
    revert_weight_conversion,
)

from millrace.errors import DataError
from millrace.model_folder import INDEX

Shape = tuple[int, ...]

# Buffers that older checkpoints store and newer models compute. `from_pretrained` ignores them too.
COMPUTED = r"(^|\.)(rotary_emb\.inv_freq|position_ids)$"


@dataclass(frozen=True, slots=True)
class View:
    """A checkpoint tensor as a view of a contiguous model tensor. `offset` and `stride` count elements."""

    shape: Shape
    stride: Shape
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this view of `tensor`, which must be contiguous. Nothing is copied."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Group:
    """Model tensors that are converted together, and the checkpoint tensors that they become.

    sources: the shapes of the model tensors, by name. shapes: the shapes of the checkpoint tensors, by name. views: the
    checkpoint tensors as views of the single source; None if they must be computed. renamed: the single source is one
    whole checkpoint tensor, under the same or another name.
    """

    sources: Mapping[str, Shape]
    shapes: Mapping[str, Shape]
    views: Mapping[str, View] | None
    renamed: bool

    @property
    def names(self) -> Collection[str]:
        """The names of the checkpoint tensors."""
        return self.shapes.keys()


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """The map from the tensors of a model's `state_dict()` to the tensors of its checkpoint.

    groups: the conversion group of each model tensor, by name. tied: the name of the tensor that each tied tensor
    shares. buffers: the names of tensors that no optimizer trains.
    """

    model: PreTrainedModel
    groups: Mapping[str, Group]
    tied: Mapping[str, str]
    buffers: frozenset[str]

    def passes_over(self, name: str) -> bool:
        """Return whether the model's class ignores a checkpoint tensor of this name.

        It does so for a buffer that it computes, and for a part that it lacks, such as a speculative head.
        """
        declared = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in (*declared, COMPUTED))

    def views(self, name: str) -> Mapping[str, View]:
        """Return the checkpoint tensors that are views of the model tensor `name`, by name.

        If they must be computed, the result has only the model tensor itself.
        """
        group = self.groups[name]
        return group.views if group.views is not None else {name: _whole(group.sources[name])}

    def convert(self, group: Group, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the checkpoint tensors of a group. `tensors` are those of `group.sources`, in this order."""
        if group.views is not None:
            whole = tensors[0].detach().contiguous()
            return {name: view.of(whole) for name, view in group.views.items()}
        return _reverted(self.model, dict(zip(group.sources, (t.detach() for t in tensors), strict=True)))


def read_names(folder: Path, stored: Collection[str] | None) -> CheckpointNames:
    """Return the names of the model whose config is in `folder`, without reading or allocating its weights.

    stored: the names of the tensors in the folder; None if it has none. Raises DataError if transformers can't create
    the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config) if kind is None else kind._from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise DataError(f"transformers can't create the model in {folder}: {error}") from error
    return names_of(model, stored)


def names_of(model: PreTrainedModel, stored: Collection[str] | None) -> CheckpointNames:
    """Return the names of `model`, as `read_names` does. Its tensors may be on the meta device."""
    state: dict[str, torch.Tensor] = model.state_dict()
    metas = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    stored_names: dict[str, str] = {}
    if stored is None:  # the conversions that `save_pretrained` uses for a model that was not loaded
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    else:
        stored_names = _note_conversions(model, stored, state)
    renamed, together = _grouped(model, list(state))
    groups = {
        old: _group({old: metas[old]}, {stored_names.get(old, new): metas[old]}, by_views=True, renamed=True)
        for old, new in renamed.items()
    }
    for group in _converted(model, metas, together):
        renamed_group = group if stored is None else _with_stored_names(group, stored, f"{model.base_model_prefix}.")
        groups |= dict.fromkeys(group.sources, renamed_group)
    tied = {
        target: source
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if target in renamed and source in renamed
    }
    buffers = frozenset(state.keys() & {name for name, _ in model.named_buffers()})
    return CheckpointNames(model, {name: groups[name] for name in state}, tied, buffers)


def load_config(folder: str | Path) -> Any:
    """Return the model's config, for `from_pretrained(folder, config=...)`.

    With this config, transformers reads the files that the index names, as stock engines do. Without it, transformers
    prefers a `model.safetensors` in the same folder.
    """
    config = AutoConfig.from_pretrained(folder)
    if (Path(folder) / INDEX).is_file():
        config.transformers_weights = INDEX
    return config


def _note_conversions(
    model: PreTrainedModel, stored: Collection[str], state: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Set on the model the conversions that loading the stored names would use, as `from_pretrained` does.

    So experts that the folder stores fused are not split when they are written. Returns the stored name of each tensor
    that is only renamed, by its name in the model.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
    stored_names: dict[str, str] = {}
    for name in sorted(stored):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = name, None
        if new in state and pattern is None:
            stored_names[new] = name
    model._weight_conversions = [c for c in conversions if c.was_used()]
    return stored_names


def _grouped(model: PreTrainedModel, names: Sequence[str]) -> tuple[dict[str, str], list[list[str]]]:
    """Return the checkpoint names of tensors that are only renamed, and the lists of tensors converted together."""
    backward = [conversion.reverse_transform() for conversion in model._weight_conversions[::-1]]
    converters = [c for c in backward if isinstance(c, WeightConverter)]
    renamings = [c for c in backward if not isinstance(c, WeightConverter)]
    renamed: dict[str, str] = {}
    together: dict[str, list[str]] = {}
    for name in names:
        key = next((new for new, pattern in (c.rename_source_key(name) for c in converters) if pattern), None)
        if key is not None:
            together.setdefault(key, []).append(name)
            continue
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        renamed[name] = new
    return renamed, list(together.values())


def _converted(
    model: PreTrainedModel, metas: Mapping[str, torch.Tensor], together: Sequence[Sequence[str]]
) -> Iterator[Group]:
    """Yield the groups of tensors that transformers converts together.

    transformers converts meta tensors of these shapes: all of them in one call, and again group by group if some
    results are not views of a single source.
    """
    owners = {_storage(metas[name]): name for names in together for name in names}
    parts: dict[str | None, dict[str, torch.Tensor]] = {}
    for name, tensor in _reverted(model, {name: metas[name] for name in owners.values()}).items():
        parts.setdefault(owners.get(_storage(tensor)), {})[name] = tensor
    for names in together:
        sources = {name: metas[name] for name in names}
        by_views = len(names) == 1 and None not in parts
        targets = parts[names[0]] if by_views else _reverted(model, sources)
        yield _group(sources, targets, by_views=by_views, renamed=False)


def _group(
    sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], *, by_views: bool, renamed: bool
) -> Group:
    views = {
        name: View(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
        for name, tensor in targets.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    return Group(
        {name: tuple(tensor.shape) for name, tensor in sources.items()}, shapes, views if by_views else None, renamed
    )


def _whole(shape: Shape) -> View:
    return View(shape, tuple(torch.empty(shape, device="meta").stride()), 0)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _with_stored_names(group: Group, stored: Collection[str], prefix: str) -> Group:
    """Return the group with the names that the folder uses: they may have the base model's prefix or lack it."""

    def stored_name(name: str) -> str:
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if name not in stored and other in stored else name

    shapes = {stored_name(name): shape for name, shape in group.shapes.items()}
    views = None if group.views is None else {stored_name(name): view for name, view in group.views.items()}
    return Group(group.sources, shapes, views, renamed=False)


class _InPlace(TorchFunctionMode):
    """Turns `Tensor.contiguous` into a no-op: transformers would copy the parts of a tensor to make them contiguous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _reverted(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` would write for these model tensors."""
    with _InPlace():
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted
