"""Quantises a trainer's matrices as the model's folder has them, before they are sent.

A folder with quantised weights says tensor by tensor how: by the dtypes and shapes of a weight and of its scales. The
trainer's matrix `x.weight` then becomes the same tensors, on the device that holds it. Half of the bytes travel, or a
quarter, and engines load them as they load the folder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from millrace.errors import PublishError
from millrace.model_folder import StoredTensor
from millrace.weights.audit import Samples, experts_in
from millrace.weights.folder import read_tensors
from millrace.weights.recipes import Recipe, recipes_of
from millrace.weights.source import NamedTensor, Shape, WeightSource

if TYPE_CHECKING:
    import torch


def as_in_folder(
    source: WeightSource,
    stored: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any] | None,
    samples: Samples,
) -> WeightSource:
    """Return the tensors, quantised as the folder has them. `samples` keeps elements of them as they were before.

    The arguments are those of `recipes_of`. Raises PublishError as `recipes_of` and `quantised` do.
    """
    recipes = recipes_of(stored, quantization)
    samples.sent = {name: recipe.sent_as for name, recipe in recipes.items()}
    samples.experts = experts_in(stored)
    inputs = read_tensors(stored, [name for recipe in recipes.values() for name in recipe.inputs])
    return quantised(samples.keep(source), recipes, inputs)


def quantised(
    source: WeightSource, recipes: Mapping[str, Recipe], inputs: "Mapping[str, torch.Tensor] | None" = None
) -> WeightSource:
    """Return the tensors, with the matrices that have a recipe quantised when they are taken.

    inputs: the scales of activations that the recipes name.

    Sharded tensors are gathered: a scale belongs to a block, which may lie on several ranks. Matrices with one scale of
    the whole are held until the last of them has come.

    Raises PublishError if a matrix has another shape than in the folder, at once if the shapes are known; and at the
    end if one of several matrices with a scale in common was not given.
    """
    if not recipes:
        return source
    shapes = source.shapes()
    outputs: dict[str, Shape] | None = None
    if shapes is not None:
        outputs = {}
        for name, shape in shapes.items():
            outputs |= _checked(recipes[name], shape).shapes if name in recipes else {name: shape}
    return replace(source.converted(partial(_quantised, recipes, inputs or {}), outputs), led=None)


def _quantised(
    recipes: Mapping[str, Recipe],
    inputs: "Mapping[str, torch.Tensor]",
    tensors: Iterator[NamedTensor],
) -> Iterator[NamedTensor]:
    """Yield the tensors of `quantised`."""
    from millrace.weights.rounding import largest_of, quantise  # imports torch

    waiting: dict[str, torch.Tensor] = {}  # by stem
    for name, tensor in tensors:
        recipe = recipes.get(name)
        if recipe is None or not tensor.is_floating_point() or tensor.itemsize < 2:
            yield name, tensor
            continue
        waiting[recipe.stem] = tensor.detach()
        _checked(recipe, tuple(tensor.shape))
        group = recipe.group or (recipe.stem,)
        if not all(stem in waiting for stem in group):
            continue
        weights = {stem: waiting.pop(stem) for stem in group}
        largest = largest_of(list(weights.values())) if recipe.group else None
        for stem, weight in weights.items():
            one = recipes[f"{stem}weight"]
            yield from quantise(weight, one, largest).items()
            for scale in one.inputs:
                yield scale, inputs[scale].to(weight.device)
    for stem in waiting:
        lacking = next(one for one in recipes[f"{stem}weight"].group if one not in waiting)
        raise PublishError(
            f"{stem}weight has a scale in common with {lacking}weight, which was not among the tensors; publish both"
        )


def _checked(recipe: Recipe, shape: Shape) -> Recipe:
    if shape != recipe.shape:
        raise PublishError(f"{recipe.stem}weight has shape {shape}, but in the model's folder it is {recipe.shape}")
    return recipe
