"""How the weights of a model should be quantised, and the form in which a layer holds them. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Block = tuple[int, int]
TENSOR: Block = (-1, -1)
CHANNEL: Block = (1, -1)
FLOAT8 = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
CONTAINERS = frozenset({"int32", "uint8"})  # dtypes that kernels pack weights of any kind into

# What an engine's option `quantization` names, or a folder's `quant_method`: bits, and the block if it is fixed.
METHODS: Mapping[str, tuple[int, Block | None]] = {
    "fp8": (8, None),
    "fp8_per_tensor": (8, TENSOR),
    "fp8_per_channel": (8, CHANNEL),
    "fp8_per_block": (8, (128, 128)),
    "w8a8_fp8": (8, None),
    "modelopt_fp8": (8, None),
    "mxfp8": (8, (1, 32)),
    "w8a8_int8": (8, CHANNEL),
    "experts_int8": (8, CHANNEL),
    "int8_per_channel_weight_only": (8, CHANNEL),
    "blockwise_int8": (8, None),
    "mxfp4": (4, (1, 32)),
    "nvfp4": (4, (1, 16)),
    "nvfp4_online": (4, (1, 16)),
    "modelopt_fp4": (4, (1, 16)),
    "awq": (4, None),
    "gptq": (4, None),
}
# What ModelOpt calls its methods.
MODELOPT: Mapping[str, tuple[int, Block | None]] = {
    "FP8": (8, TENSOR),
    "MXFP8": (8, (1, 32)),
    "NVFP4": (4, (1, 16)),
    "W4A16_NVFP4": (4, (1, 16)),
}
EXPERTS_ONLY = frozenset({"experts_int8", "int8_per_channel_weight_only", "nvfp4"})  # vLLM's, on experts alone
# Modules that engines leave unquantised, or quantise, without being asked: embeddings, heads, norms, routers, vision.
FREE = re.compile(r"(^|\.)(lm_head|embed_\w+|wte|\w*norm\w*|gate|router|shared_expert_gate|visual|vision\w*)(\.|$)")


@dataclass(frozen=True, slots=True)
class LayerForm:
    """The form in which a layer holds its weights.

    dtype: torch's name of the dtype in memory. bits: of one weight. block: the rows and columns of the weight that have
    a scale in common, where -1 stands for all of them; None without scales, (0, 0) if a kernel has packed the scales.
    """

    dtype: str
    bits: int
    block: Block | None

    def __str__(self) -> str:
        packed = self.dtype in CONTAINERS and self.bits < 16
        return f"{f'{self.bits} bits in ' if packed else ''}{self.dtype}{scaled(self.block)}"

    @property
    def bound(self) -> float:
        """The largest plausible error of such a layer: the L2 norm of what it holds minus what was sent, over that of
        what was sent.

        Rounding weights with a normal distribution gives about 0.002 with 16 bits, 0.026 in float8_e4m3fn, 0.007 to
        0.03 in int8 with a scale for each channel, and 0.1 to 0.15 with 4 bits.
        """
        return 0.01 if self.bits >= 16 else 0.1 if self.bits >= 8 else 0.3


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the layers of a model should be quantised.

    method: the engine's name for it. bits: of one weight; None if the method is not known here. block: the rows and
    columns with a scale in common; None if the engine may choose. ignored: patterns of layers that stay as they are: a
    part of the name, a pattern of a shell or, after `re:`, a regular expression.
    """

    method: str
    bits: int | None = None
    block: Block | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method}{scaled(self.block)}"

    def covers(self, tensor: str) -> bool:
        """Return whether the layer that this tensor of the checkpoint belongs to must be quantised."""
        layer = tensor.removesuffix(".weight")
        free = FREE.search(layer) is not None or any(_ignores(one, layer) for one in self.ignored)
        beside = self.method in EXPERTS_ONLY and ".experts." not in f"{layer}."
        return self.bits is not None and not free and not beside

    def admits(self, form: LayerForm) -> bool:
        """Return whether a layer in this form is quantised as it should be. Scales for smaller blocks are too: engines
        repeat a scale for a whole layer for each of its rows."""
        if self.bits is None:
            return True
        kinds = FLOAT8 if "fp8" in self.method else frozenset({"int8"}) if self.bits == 8 else frozenset()
        known = not kinds or form.dtype in kinds | CONTAINERS
        return known and form.bits == self.bits and _divides(form.block, self.block)


def scaled(block: Block | None) -> str:
    """Return what to say about the scales of a layer, to follow its dtype."""
    match block:
        case None:
            return ""
        case (-1, -1):
            return " with one scale"
        case (1, -1):
            return " with a scale for each row"
        case (0, 0):
            return " with packed scales"
    return f" with scales for blocks of {'x'.join('all' if size < 0 else str(size) for size in block)}"


def quantisation_of(option: str | None, config: Mapping[str, Any] | None) -> Quantisation | None:
    """Return how an engine with this option `quantization` should quantise a model.

    config: the `quantization_config` of the model's folder; None if the folder is not quantised. None if neither asks
    for it.
    """
    if config is None:
        bits, block = METHODS.get(option or "", (None, None))
        return None if option is None else Quantisation(option, bits, block)
    method = str(config.get("quant_method", option))
    if method == "modelopt":  # older folders have a table in the table
        config = {**config, **(config.get("quantization") or {})}
    names = (config.get(key) or () for key in ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"))
    ignored = tuple(str(name) for several in names for name in several)
    if method == "compressed-tensors":
        bits, block, kind = _compressed(config)
        return Quantisation(f"{kind} ({method})", bits, block, ignored)
    if method == "modelopt":
        algorithm = str(config.get("quant_algo"))
        bits, block = MODELOPT.get(algorithm.upper(), (None, None))
        return Quantisation(f"{algorithm.lower()} ({method})", bits, block, ignored)
    bits, block = METHODS.get(method, (None, None))
    sizes = config.get("weight_block_size")
    if isinstance(sizes, list) and len(sizes) == 2:
        block = int(sizes[0]), int(sizes[1])
    return Quantisation(method, bits, block, ignored)


def _compressed(config: Mapping[str, Any]) -> tuple[int | None, Block | None, str]:
    """Return bits, block and a name of what compressed-tensors describes; no bits if its layers differ."""
    groups = list((config.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    bits, kind = weights.get("num_bits"), "fp" if weights.get("type") == "float" else "int"
    if bits is None:
        return None, None, "mixed"
    group, sizes = weights.get("group_size"), weights.get("block_structure")
    block: Block | None = {"tensor": TENSOR, "channel": CHANNEL}.get(str(weights.get("strategy")))
    if weights.get("strategy") in ("group", "tensor_group") and isinstance(group, int):
        block = (1, group)
        kind = {(8, 32): "mxfp", (4, 16): "nvfp"}.get((bits, group), kind) if kind == "fp" else kind
    elif isinstance(sizes, list) and len(sizes) == 2:
        block = int(sizes[0]), int(sizes[1])
    return int(bits), block, f"{kind}{bits}"


def _ignores(pattern: str, layer: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), layer) is not None
    return pattern in layer or fnmatchcase(layer, pattern)


def _divides(held: Block | None, wanted: Block | None) -> bool:
    """Return whether blocks of the size `held` are parts of blocks of the size `wanted`."""
    if wanted is None or held == (0, 0):
        return True
    if held is None:
        return False
    sizes = zip(held, wanted, strict=True)
    return all(whole == -1 or (0 < part <= whole and whole % part == 0) for part, whole in sizes)
