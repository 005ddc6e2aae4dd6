"""How each matrix of a model is quantised, as the model's folder says by the dtypes and shapes of its tensors. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from millrace.errors import PublishError
from millrace.model_folder import StoredTensor
from millrace.weights.audit import SentAs
from millrace.weights.source import Shape

Kind = Literal["fp8", "mxfp8", "int8", "int4", "nvfp4"]

# safetensors' dtypes of scales -> torch's
SCALES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U8": "uint8",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
}
POWERS = frozenset({"U8", "F8_E8M0"})  # dtypes of scales that are powers of two
MADE = {"fp8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "int8": "int8", "int4": "int32", "nvfp4": "uint8"}
PACKED = {"int4": 8, "nvfp4": 2}  # weights in one element
GLOBAL_SCALES = ("weight_global_scale", "weight_scale_2")  # of NVFP4: compressed-tensors' divisor, ModelOpt's factor
INPUT_SCALES = ("input_scale", "input_global_scale")
# Matrices that engines make one layer of, which has one global scale.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
LAST = re.compile(r"([^.]+)\.$")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one matrix is quantised.

    kind: of its weights. stem: its name without `weight`. shape: of the matrix. block: the rows and columns that share
    a scale. scale: the end of the scales' name. scale_shape, scale_dtype: of the scales. whole, whole_shape: the end of
    the name of a scale of the whole matrix, and its shape; empty if it has none. inputs: the names of the scales of
    activations, which are sent as they are in the folder. group: the stems of the matrices with one scale of the whole.
    """

    kind: Kind
    stem: str
    shape: Shape
    block: tuple[int, int]
    scale: str
    scale_shape: Shape
    scale_dtype: str
    whole: str = ""
    whole_shape: Shape = ()
    inputs: Mapping[str, Shape] = field(default_factory=dict)
    group: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """The name of the tensor that has the weights."""
        packed = self.kind == "int4" or self.whole == "weight_global_scale"
        return f"{self.stem}{'weight_packed' if packed else 'weight'}"

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors that it makes, by name: weights, scales, and what else belongs to them."""
        height, width = self.shape
        found = {
            self.weight: (height, width // PACKED.get(self.kind, 1)),
            f"{self.stem}{self.scale}": self.scale_shape,
        }
        if self.kind == "int4":
            found[f"{self.stem}weight_shape"] = (2,)
        if self.whole:
            found[f"{self.stem}{self.whole}"] = self.whole_shape
        return {**found, **self.inputs}

    @property
    def sent_as(self) -> SentAs:
        """The tensor that has the weights."""
        return SentAs(self.weight, MADE[self.kind], self.shapes[self.weight], PACKED.get(self.kind, 1))


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
        scale = _first(stored, stem, ("weight_scale_inv", "weight_scale"))
        whole = _first(stored, stem, GLOBAL_SCALES)
        if scale is None and tensor.dtype not in ("F8_E4M3", "I8", "I32", "U8"):
            continue
        kind = _kind(tensor.dtype, stored[f"{stem}{scale}"].dtype if scale is not None else "", whole)
        if kind is None or scale is None or len(tensor.shape) != 2:
            raise _unknown(name, tensor)
        if kind == "int4" and _bits(quantization) != 4:
            raise PublishError(
                f"the model's folder has {name} packed with {_bits(quantization)} bits; Millrace packs 4"
            )
        scales, (height, width) = stored[f"{stem}{scale}"], tensor.shape
        shape = height, width * PACKED.get(kind, 1)
        given = sizes if isinstance(sizes, list) and kind == "fp8" else None
        block = _block(shape, scales.shape) if given is None else (int(given[0]), int(given[1]))
        recipe = Recipe(
            kind,
            stem,
            shape,
            block,
            scale,
            scales.shape,
            SCALES[scales.dtype],
            whole or "",
            stored[f"{stem}{whole}"].shape if whole is not None else (),
            {end: stored[end].shape for end in (f"{stem}{one}" for one in INPUT_SCALES) if end in stored},
            _group(stem, stored) if kind == "nvfp4" else (),
        )
        if recipe.weight != name:
            raise _unknown(name, tensor)
        found[f"{stem}weight"] = recipe
    return found


def _kind(dtype: str, scales: str, whole: str | None) -> Kind | None:
    """Return the kind of weights with these dtypes of safetensors; None if it is not known here."""
    if whole is not None:
        return "nvfp4" if (dtype, scales) == ("U8", "F8_E4M3") else None
    if scales in POWERS:
        return "mxfp8" if dtype == "F8_E4M3" else None
    kinds: Mapping[str, Kind] = {"F8_E4M3": "fp8", "I8": "int8", "I32": "int4"}
    return kinds.get(dtype) if scales in SCALES else None


def _unknown(name: str, tensor: StoredTensor) -> PublishError:
    return PublishError(
        f"the model's folder has {name} in {tensor.dtype}, and Millrace can't quantise weights in this way; it can "
        "make fp8 with scales for blocks, rows or whole tensors, MXFP8, NVFP4, int8 with scales for rows, packed int4"
    )


def _first(stored: Mapping[str, StoredTensor], stem: str, ends: Iterable[str]) -> str | None:
    return next((end for end in ends if f"{stem}{end}" in stored), None)


def _group(stem: str, stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Return the stems of the matrices of the layer that an engine makes of this one."""
    last = LAST.search(stem)
    for names in FUSED:
        if last is not None and last[1] in names:
            stems = (f"{stem[: last.start()]}{name}." for name in names)
            return tuple(one for one in stems if _first(stored, one, GLOBAL_SCALES) is not None)
    return (stem,)


def _block(shape: Shape, scales: Shape) -> tuple[int, int]:
    """Return the block that has a scale in common, for a matrix of this shape and scales of that one."""
    height, width = shape
    down, across = (*scales, 1, 1)[:2] if len(scales) < 2 else scales
    return -(-height // down), -(-width // across)


def _bits(quantization: Mapping[str, Any] | None) -> object:
    groups = list(((quantization or {}).get("config_groups") or {}).values())
    return (groups[0].get("weights") or {}).get("num_bits") if groups else None
