"""Compares samples of the weights that a trainer has sent with what the layers of a model hold. Engines run this file.

A sample is some rows and columns of one tensor. What a linear layer holds is measured by using it: applied to a row of
the identity matrix, it returns a column of its weight, whatever kernel it uses and however that has packed the weight.
Layers that are not quantised, and experts, are read from memory instead.

It imports nothing of Millrace, SGLang or vLLM.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from millrace_boxes import Box
from millrace_words import first_line

TOGETHER = 64  # columns that are measured by one call
LARGEST = 1e300  # stands for differences that JSON can't express
STATIC = 256.0  # a power of two that every quantised dtype holds exactly
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the three lower bits of float4_e2m1fn stand for
BIAS = 127  # of a scale that is the exponent of a power of two
# Kernels of experts that use them as they are.
PLAIN = ("TRITON", "BATCHED_TRITON", "DEEPGEMM", "EMULATION", "triton", "deep_gemm")


class Sample(NamedTuple):
    """Elements of a tensor. name, dtype, shape: of the tensor that was sent for it. packed: how many weights one of its
    elements has. rows, columns: the places of the weights. values: of the trainer, [rows, columns] in bfloat16."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    packed: int
    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


class Place(NamedTuple):
    """Where a box of a sent tensor lies in a parameter, in the form in which a checkpoint fills the parameter.

    along: which dimension of the sent tensor each dimension of the region goes along. offset, strides: of the region in
    the parameter, in elements. shape: of the parameter.
    """

    module: str
    parameter: str
    box: Box
    along: tuple[int | None, ...]
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(slots=True)
class Layer:
    """What is known of one layer. such_as: the name of one of its sent tensors. difference, norm: sums of squares over
    the sampled elements. note: why it could not be measured."""

    such_as: str
    form: tuple[str, int, tuple[int, int] | None]
    difference: float = 0.0
    norm: float = 0.0
    elements: int = 0
    note: str = ""


@dataclass(slots=True)
class Wanted:
    """Samples in one parameter: for each its place in the parameter, as expert, rows and columns, and its values.

    such_as: one of the tensors that were sent for the parameter.
    """

    place: Place
    such_as: Sample
    spots: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)


def read_samples(text: str) -> list[Sample]:
    """Read samples from JSON. Raises what a text in another form makes."""
    return [
        Sample(
            *(str(name), getattr(torch, dtype), tuple(shape), int(packed)),
            *(torch.tensor(rows), torch.tensor(columns)),
            torch.frombuffer(bytearray(base64.b64decode(values)), dtype=torch.bfloat16).view(len(rows), len(columns)),
        )
        for name, dtype, shape, packed, rows, columns, values in json.loads(text)["audit"]
    ]


def audited(
    samples: Sequence[Sample], places: Callable[[Sample], Sequence[Place]], modules: Mapping[str, torch.nn.Module]
) -> dict[str, Any]:
    """Return what the layers hold, as JSON. `elsewhere`: the numbers of the samples of which this rank has nothing."""
    wanted: dict[tuple[str, str], Wanted] = {}
    elsewhere = []
    for number, sample in enumerate(samples):
        found = False
        for place in places(sample):
            spot = spot_of(sample, place)
            if spot is not None:
                found = True
                one = wanted.setdefault((place.module, place.parameter), Wanted(place, sample))
                one.spots.append(spot)
        if not found:
            elsewhere.append(number)
    layers: dict[str, Layer] = {}
    with torch.no_grad():
        for one in wanted.values():
            compare(one, modules[one.place.module], layers)
    rows = {
        path: [one.such_as, *one.form, one.difference, one.norm, one.elements, one.note] for path, one in layers.items()
    }
    return {"layers": rows, "elsewhere": elsewhere}


def spot_of(sample: Sample, place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return where the sampled elements lie in a parameter, as expert, row and column of each, and their values; None
    if none of them lies there."""
    (top, bottom), (left, right) = place.box
    packed = sample.columns // sample.packed
    rows, columns = ((sample.rows >= top) & (sample.rows < bottom)), ((packed >= left) & (packed < right))
    if not rows.any() or not columns.any():
        return None
    steps = [0, 0]
    for along, stride in zip(place.along, place.strides, strict=True):
        if along is not None:
            steps[along] = stride
    down, across = (sample.rows[rows] - top) * steps[0], (packed[columns] - left) * steps[1]
    flat = place.offset + down[:, None] + across[None, :]
    height, width = place.shape[-2:]
    within = flat % (height * width)
    inner = (sample.columns % sample.packed)[columns]
    return (
        flat // (height * width),
        within // width,
        within % width * sample.packed + inner[None, :],
        sample.values[rows][:, columns],
    )


def compare(wanted: Wanted, module: torch.nn.Module, layers: dict[str, Layer]) -> None:
    """Measure one parameter, and add it to what is known of its layer."""
    place = wanted.place
    shape = (*place.shape[:-1], place.shape[-1] * wanted.such_as.packed)
    form = form_of(module, place.parameter, shape, wanted.such_as)
    layer = layers.setdefault(place.module, Layer(wanted.such_as.name, form))
    if form[1] > layer.form[1]:  # of a layer's parameters, the one that is quantised least
        layer.form = form
    experts, rows, columns = (torch.cat([spot[part].flatten() for spot in wanted.spots]) for part in range(3))
    sent = torch.cat([spot[3].flatten() for spot in wanted.spots]).double()
    try:
        held = held_values(module, place.parameter, shape, form, experts, rows, columns)
    except Exception as error:  # a kernel of any kind runs here
        layer.note = layer.note or f"{type(error).__name__}: {first_line(error)}"
        return
    if isinstance(held, str):
        layer.note = layer.note or held
        return
    difference = float((held.cpu().double() - sent).square().sum())
    layer.difference += difference if difference < LARGEST else LARGEST
    layer.norm += float(sent.square().sum())
    layer.elements += len(sent)


def held_values(
    module: Any,
    name: str,
    shape: tuple[int, ...],
    form: tuple[str, int, tuple[int, int] | None],
    experts: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor | str:
    """Return what a layer holds at these places of its weight, or why it can't be said."""
    tensor = weight_of(module, name)
    unchanged = tensor is not None and not is_packed(module) and tuple(tensor.shape) in (shape, in_bytes(shape, tensor))
    if len(shape) > 2 and not (unchanged and uses_as_loaded(module, form)):
        return "its kernel has rearranged the experts, and they can't be read"
    if tensor is not None and unchanged and (form[1] >= 16 or len(shape) > 2):
        return read_values(module, name, shape, tensor, experts, rows, columns)
    if not hasattr(module, "quant_method"):
        return "it is in another form than a checkpoint, and it is no linear layer"
    return measured(module, shape, rows, columns)


def weight_of(module: Any, name: str) -> torch.Tensor | None:
    """Return a layer's weight, which a kernel may have renamed; None if a kernel keeps it."""
    for one in (name, name.removesuffix("_packed")):
        tensor = getattr(module, one, None)
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            return tensor
    return None


def in_bytes(shape: tuple[int, ...], tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the shape that a tensor of bytes has with two weights in each; None for tensors of others."""
    return (*shape[:-1], shape[-1] // 2) if tensor.dtype == torch.uint8 else None


def is_packed(module: Any) -> bool:
    """Return whether a kernel for the CPU has packed a layer's weight in place."""
    return bool(getattr(module, "use_intel_amx_backend", False)) or "cpu_linear" in vars(module)


def uses_as_loaded(module: Any, form: tuple[str, int, tuple[int, int] | None]) -> bool:
    """Return whether experts are used as they were loaded, by the name of their kernel."""
    method = module.quant_method
    runner = getattr(getattr(method, "runner", None), "runner_backend", None)  # SGLang
    backends = ("fp8_backend", "mxfp8_backend", "nvfp4_backend", "unquantized_backend")
    kernels = (*(getattr(method, backend, None) for backend in backends), runner)
    names = [str(getattr(one, "value", one)) for one in kernels if one is not None]
    names += [str(getattr(one, "name", one)) for one in kernels if one is not None]
    return any(name in PLAIN for name in names) or (not names and form[1] >= 16)


def read_values(
    module: Any,
    name: str,
    shape: tuple[int, ...],
    tensor: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Read elements of a weight, times their scales: [n] float32 on the CPU."""
    at = [one.to(tensor.device) for one in (experts, rows, columns)]
    held = elements(tensor, shape, at if len(shape) > 2 else at[1:])
    scale = scale_of(module, name)
    if scale is None:
        return held.cpu()
    grid = grid_of(scale, shape)
    height, width = shape[-2:]
    down, across = block_size(height, grid.shape[1]), block_size(width, grid.shape[2])
    held = held * scale_values(grid[at[0], at[1] // down, at[2] // across])
    whole = getattr(module, f"{name.removesuffix('_packed')}_scale_2", None)
    if isinstance(whole, torch.Tensor):
        held = held * whole.reshape(math.prod(shape[:-2]), -1)[at[0], 0]
    return held.cpu()


def elements(tensor: torch.Tensor, shape: tuple[int, ...], places: list[torch.Tensor]) -> torch.Tensor:
    """Return elements of a weight of this shape, without their scales: [n] float32."""
    if tensor.shape[-1] == shape[-1]:
        held = tensor.view(torch.uint8)[tuple(places)] if tensor.itemsize == 1 else tensor[tuple(places)]
        return held.view(tensor.dtype).float()
    *before, columns = places
    codes = tensor[(*before, columns // 2)].int() >> (4 * (columns % 2))
    values = torch.tensor(FLOAT4, device=tensor.device)[codes & 7]
    return torch.where(codes & 8 > 0, -values, values)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as float32. Bytes are exponents of powers of two."""
    return torch.exp2(scales.float() - BIAS) if scales.dtype == torch.uint8 else scales.float()


def measured(module: Any, shape: tuple[int, ...], rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return elements of the weight of a linear layer by applying the layer to rows of the identity: [n] float32."""
    some, number_of = torch.unique(columns, return_inverse=True)
    device, dtype = where(module)
    one = exact_input(module)
    made = []
    for start in range(0, len(some), TOGETHER):
        chosen = some[start : start + TOGETHER].to(device)
        inputs = torch.zeros(len(chosen), shape[-1], dtype=dtype, device=device)
        inputs[torch.arange(len(chosen), device=device), chosen] = one
        made.append(module.quant_method.apply(module, inputs, None).float().cpu() / one)
    return torch.cat(made)[number_of, rows]


def exact_input(module: Any) -> float:
    """Return a value that a layer's kernel rounds to itself if it quantises what the layer is applied to."""
    for name, factor in (("input_scale", STATIC), ("input_global_scale", STATIC * FLOAT4[-1])):
        static = getattr(module, name, None)
        if isinstance(static, torch.Tensor) and static.numel():
            return float(static.max()) * factor
    return 1.0


def where(module: Any) -> tuple[torch.device, torch.dtype]:
    """Return the device of a layer, and the dtype of what it is applied to."""
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    dtype = getattr(module, "params_dtype", None) or getattr(module, "orig_dtype", None) or torch.get_default_dtype()
    return device, dtype


def form_of(
    module: Any, name: str, shape: tuple[int, ...], sent: Sample | None = None
) -> tuple[str, int, tuple[int, int] | None]:
    """Return the dtype in memory of a weight of this shape, its bits, and the block that has a scale in common. If a
    kernel keeps the weight, they are those of the tensor that was sent, if that has scales too."""
    tensor, scale = weight_of(module, name), scale_of(module, name)
    count = math.prod(shape)
    if tensor is not None:
        dtype, bits = str(tensor.dtype).removeprefix("torch."), round(8 * tensor.nbytes / count)
    elif scale is None:
        dtype, bits = str(where(module)[1]).removeprefix("torch."), 16
    elif sent is not None and (sent.packed > 1 or sent.dtype.itemsize == 1):
        dtype, bits = str(sent.dtype).removeprefix("torch."), 8 * sent.dtype.itemsize // sent.packed
    else:
        dtype, bits = "unknown", 0
    if scale is None:
        return dtype, bits, None
    if not scale.is_floating_point() and scale.dtype != torch.uint8:  # packed by a kernel
        return dtype, bits, (0, 0)
    down, across = grid_of(scale, shape).shape[1:]
    height, width = shape[-2:]
    blocks = scale.dim() == len(shape) and (down * across > 1 or hasattr(module, f"{name}_scale_inv"))
    if across == 1 and not (blocks and down < height):
        shards = len(getattr(module, "logical_widths", None) or ())
        return dtype, bits, (-1 if down <= max(1, shards) else block_size(height, down), -1)
    return dtype, bits, (block_size(height, down), block_size(width, across))


def block_size(size: int, count: int) -> int:
    """Return the size of `count` blocks in a dimension of this size: a power of two, if the last block may be shorter
    than the others."""
    least = -(-size // count)
    power = 1 << (least - 1).bit_length()
    return power if -(-size // power) == count else least


def scale_of(module: Any, name: str) -> torch.Tensor | None:
    """Return the scales of a weight; None if it has none."""
    base = name.removesuffix("_packed")
    for scale in (f"{base}_scale_inv", f"{base}_scale", "scales"):
        found = getattr(module, scale, None)
        if isinstance(found, torch.Tensor) and found.numel():
            return found
    return None


def grid_of(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return scales as [experts, blocks of rows, blocks of columns]."""
    experts = math.prod(shape[:-2])
    height, width = shape[-2:]
    each = scale.numel() // experts
    if scale.dim() >= 2 and scale.dim() == len(shape) and scale.shape[-2] * scale.shape[-1] == each:
        down, across = scale.shape[-2:]
        turned = across in (height, 1) and down not in (height, 1) and width % down == 0 and across == height
        grid = scale.reshape(experts, down, across)
        if down == 1 and across == height:
            return grid.transpose(1, 2)
        return grid.transpose(1, 2) if turned else grid
    several = each > height and each % height == 0  # in a kernel's own order
    return scale.reshape(experts, height, -1) if several else scale.reshape(experts, each, 1)
