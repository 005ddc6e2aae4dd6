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
PLAIN = ("TRITON", "BATCHED_TRITON", "DEEPGEMM", "triton", "deep_gemm")  # kernels of experts that use them as they are


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
    """Samples in one parameter: for each its place in the parameter, as expert, rows and columns, and its values."""

    place: Place
    packed: int
    such_as: str
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
                one = wanted.setdefault((place.module, place.parameter), Wanted(place, sample.packed, sample.name))
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
    shape = (*place.shape[:-1], place.shape[-1] * wanted.packed)
    form = form_of(module, place.parameter, shape)
    layer = layers.setdefault(place.module, Layer(wanted.such_as, form))
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
    tensor: Any = getattr(module, name, None)
    unchanged = isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape and not is_packed(module)
    if len(shape) > 2 and not (unchanged and uses_as_loaded(module, form)):
        return "its kernel has rearranged the experts, and they can't be read"
    if unchanged and (form[1] >= 16 or len(shape) > 2):
        return read_values(module, name, shape, tensor, experts, rows, columns)
    if not hasattr(module, "quant_method"):
        return "it is in another form than a checkpoint, and it is no linear layer"
    return measured(module, shape, rows, columns)


def is_packed(module: Any) -> bool:
    """Return whether a kernel for the CPU has packed a layer's weight in place."""
    return bool(getattr(module, "use_intel_amx_backend", False)) or "cpu_linear" in vars(module)


def uses_as_loaded(module: Any, form: tuple[str, int, tuple[int, int] | None]) -> bool:
    """Return whether experts are used as they were loaded, by the name of their kernel."""
    method = module.quant_method
    runner = getattr(getattr(method, "runner", None), "runner_backend", None)  # SGLang
    kernels = (getattr(method, "fp8_backend", None), getattr(method, "unquantized_backend", None), runner)
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
    places = at if len(shape) > 2 else at[1:]
    held = tensor.view(torch.uint8)[tuple(places)] if tensor.itemsize == 1 else tensor[tuple(places)]
    held = held.view(tensor.dtype).float()
    scale = scale_of(module, name)
    if scale is None:
        return held.cpu()
    grid = grid_of(scale, shape)
    height, width = shape[-2:]
    down, across = block_size(height, grid.shape[1]), block_size(width, grid.shape[2])
    return (held * grid[at[0], at[1] // down, at[2] // across].float()).cpu()


def measured(module: Any, shape: tuple[int, ...], rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return elements of the weight of a linear layer by applying the layer to rows of the identity: [n] float32."""
    some, number_of = torch.unique(columns, return_inverse=True)
    device, dtype = where(module)
    static = getattr(module, "input_scale", None)
    one = float(static.max()) * STATIC if isinstance(static, torch.Tensor) and static.numel() else 1.0
    made = []
    for start in range(0, len(some), TOGETHER):
        chosen = some[start : start + TOGETHER].to(device)
        inputs = torch.zeros(len(chosen), shape[-1], dtype=dtype, device=device)
        inputs[torch.arange(len(chosen), device=device), chosen] = one
        made.append(module.quant_method.apply(module, inputs, None).float().cpu() / one)
    return torch.cat(made)[number_of, rows]


def where(module: Any) -> tuple[torch.device, torch.dtype]:
    """Return the device of a layer, and the dtype of what it is applied to."""
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    dtype = getattr(module, "params_dtype", None) or getattr(module, "orig_dtype", None) or torch.get_default_dtype()
    return device, dtype


def form_of(module: Any, name: str, shape: tuple[int, ...]) -> tuple[str, int, tuple[int, int] | None]:
    """Return the dtype in memory of a weight of this shape, its bits, and the block that has a scale in common."""
    tensor, scale = getattr(module, name, None), scale_of(module, name)
    count = math.prod(shape)
    if isinstance(tensor, torch.Tensor) and tensor.numel():
        dtype, bits = str(tensor.dtype).removeprefix("torch."), round(8 * tensor.nbytes / count)
    else:  # a kernel keeps it
        dtype, bits = ("unknown", 0) if scale is not None else (str(where(module)[1]).removeprefix("torch."), 16)
    if scale is None:
        return dtype, bits, None
    if not scale.is_floating_point():  # packed by a kernel
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
