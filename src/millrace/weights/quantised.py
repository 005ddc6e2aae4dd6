"""Quantises a trainer's matrices as the model's folder has them, before they are sent.

A folder with quantised weights says tensor by tensor how: by the dtypes and shapes of a weight and of its scales. The
trainer's matrix `x.weight` then becomes the same tensors, on the device that holds it. Half of the bytes travel, or a
quarter, and engines load them as they load the folder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from millrace.errors import PublishError
from millrace.model_folder import StoredTensor
from millrace.weights.audit import Samples, SentAs, experts_in
from millrace.weights.source import NamedTensor, Shape, WeightSource

if TYPE_CHECKING:
    import torch


LEAST = 1e-4  # a block's largest value counts as at least this: the engines' own convention for fp8
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32"}
FLOAT8 = "F8_E4M3"
PACKED = 8  # 4-bit weights in one int32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one matrix is quantised.

    kind: of its weights. stem: its name without `weight`. shape: of the matrix. block: the rows and columns that share
    a scale. scale: the end of the scales' name. scale_shape, scale_dtype: of the scales.
    """

    kind: Literal["fp8", "int8", "int4"]
    stem: str
    shape: Shape
    block: tuple[int, int]
    scale: str
    scale_shape: Shape
    scale_dtype: str

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors that it makes, by name."""
        scales = {f"{self.stem}{self.scale}": self.scale_shape}
        if self.kind != "int4":
            return {f"{self.stem}weight": self.shape, **scales}
        height, width = self.shape
        return {f"{self.stem}weight_packed": (height, width // PACKED), **scales, f"{self.stem}weight_shape": (2,)}

    @property
    def sent_as(self) -> SentAs:
        """The tensor that has the weights."""
        name, shape = next(iter(self.shapes.items()))
        dtype = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "int32"}[self.kind]
        return SentAs(name, dtype, shape, PACKED if self.kind == "int4" else 1)


def recipes_of(stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None) -> dict[str, Recipe]:
    """Return how the folder's matrices are quantised, by the trainer's names for them.

    stored: the tensors of the folder. quantization: its `quantization_config`.

    Raises PublishError if a matrix is quantised in a way that is not known here.
    """
    found: dict[str, Recipe] = {}
    sizes = (quantization or {}).get("weight_block_size")
    for name, tensor in stored.items():
        if not name.endswith((".weight", ".weight_packed")):
            continue
        stem = name.removesuffix("weight").removesuffix("weight_packed")
        kind = {FLOAT8: "fp8", "I8": "int8", "I32": "int4"}.get(tensor.dtype)
        scale = next((end for end in ("weight_scale_inv", "weight_scale") if f"{stem}{end}" in stored), None)
        if kind is None and scale is None:
            continue
        if kind is None or scale is None or len(tensor.shape) != 2 or (kind == "int4") != name.endswith("_packed"):
            raise PublishError(
                f"the model's folder has {name} in {tensor.dtype}, and Millrace can't quantise weights in this way; it "
                "can make fp8 with scales for blocks, rows or whole tensors, int8 with scales for rows, and packed int4"
            )
        if kind == "int4" and _bits(quantization) != 4:
            raise PublishError(
                f"the model's folder has {name} packed with {_bits(quantization)} bits; Millrace packs 4"
            )
        scales = stored[f"{stem}{scale}"]
        height, width = tensor.shape
        shape = (height, width * PACKED) if kind == "int4" else (height, width)
        block = (int(sizes[0]), int(sizes[1])) if isinstance(sizes, list) else _block(shape, scales.shape)
        recipe = Recipe(kind, stem, shape, block, scale, scales.shape, TORCH_NAMES[scales.dtype])  # type: ignore[arg-type]
        found[f"{stem}weight"] = recipe
    return found


def _block(shape: Shape, scales: Shape) -> tuple[int, int]:
    """Return the block that has a scale in common, for a matrix of this shape and scales of that one."""
    height, width = shape
    down, across = (*scales, 1, 1)[:2] if len(scales) < 2 else scales
    return -(-height // down), -(-width // across)


def _bits(quantization: Mapping[str, Any] | None) -> object:
    groups = list(((quantization or {}).get("config_groups") or {}).values())
    return (groups[0].get("weights") or {}).get("num_bits") if groups else None


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
    return quantised(samples.keep(source), recipes)


def quantised(source: WeightSource, recipes: Mapping[str, Recipe]) -> WeightSource:
    """Return the tensors, with the matrices that have a recipe quantised when they are taken.

    Sharded tensors are gathered: a scale belongs to a block, which may lie on several ranks.

    Raises PublishError if a matrix has another shape than in the folder; at once if the shapes are known.
    """
    if not recipes:
        return source
    shapes = source.shapes()
    outputs: dict[str, Shape] | None = None
    if shapes is not None:
        outputs = {}
        for name, shape in shapes.items():
            outputs |= _checked(recipes[name], shape).shapes if name in recipes else {name: shape}

    def as_they_come(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            recipe = recipes.get(name)
            if recipe is None or not tensor.is_floating_point() or tensor.itemsize < 2:
                yield name, tensor
            else:
                yield from quantise(tensor.detach(), _checked(recipe, tuple(tensor.shape))).items()

    return replace(source.converted(as_they_come, outputs), led=None)


def _checked(recipe: Recipe, shape: Shape) -> Recipe:
    if shape != recipe.shape:
        raise PublishError(f"{recipe.stem}weight has shape {shape}, but in the model's folder it is {recipe.shape}")
    return recipe


def quantise(weight: "torch.Tensor", recipe: Recipe) -> "dict[str, torch.Tensor]":
    """Return the tensors of a quantised matrix by name, on its device.

    weight: [rows, columns] of any float dtype; it is not rounded to another float before.

    For fp8 the values are bit for bit those of SGLang and vLLM (`per_block_cast_to_fp8`): the scale is the block's
    largest value over 448.
    """
    import torch

    names = list(recipe.shapes)
    dtype: torch.dtype = getattr(torch, recipe.scale_dtype)
    blocks = in_blocks(weight, recipe.block)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    if recipe.kind == "fp8":
        scales = (largest.clamp(LEAST) / 448.0).to(dtype)
        made = out_of_blocks(blocks * (1.0 / scales.float()), recipe.shape).to(torch.float8_e4m3fn)
    elif recipe.kind == "int8":
        scales = (largest.clamp(LEAST) / 127.0).to(dtype)
        made = out_of_blocks((blocks / scales.float()).round_().clamp_(-127, 127), recipe.shape).to(torch.int8)
    else:
        scales = (largest.clamp(LEAST) / 7.5).to(dtype)
        made = pack(out_of_blocks((blocks / scales.float()).round_().clamp_(-8, 7), recipe.shape))
    found = {names[0]: made, names[1]: scales.reshape(recipe.scale_shape)}
    if recipe.kind == "int4":
        found[names[2]] = torch.tensor(recipe.shape, device=weight.device)
    return found


def in_blocks(weight: "torch.Tensor", block: tuple[int, int]) -> "torch.Tensor":
    """Return a matrix as [blocks down, rows, blocks across, columns] float32, with zeros where a block is not full."""
    import torch

    (height, width), (rows, columns) = weight.shape, block
    down, across = -(-height // rows), -(-width // columns)
    if (down * rows, across * columns) != (height, width):
        weight = torch.nn.functional.pad(weight, (0, across * columns - width, 0, down * rows - height))
    return weight.float().reshape(down, rows, across, columns)


def out_of_blocks(blocks: "torch.Tensor", shape: Shape) -> "torch.Tensor":
    """Return a matrix of this shape from its blocks: the inverse of `in_blocks`."""
    down, rows, across, columns = blocks.shape
    return blocks.reshape(down * rows, across * columns)[: shape[0], : shape[1]].contiguous()


def pack(weight: "torch.Tensor") -> "torch.Tensor":
    """Return integers from -8 to 7, [rows, columns], as [rows, columns / 8] int32, in compressed-tensors' order."""
    import torch

    fields = (weight.to(torch.int32) + 8).reshape(weight.shape[0], -1, PACKED)
    packed = torch.zeros(fields.shape[:2], dtype=torch.int32, device=weight.device)
    for place in range(PACKED):
        packed |= fields[:, :, place] << (4 * place)
    return packed
