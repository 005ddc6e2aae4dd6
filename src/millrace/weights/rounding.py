"""Rounds matrices to the formats in which engines load them. Pure functions of tensors, on the tensors' device."""

from collections.abc import Sequence

import torch

from millrace.weights.recipes import PACKED, Recipe
from millrace.weights.source import Shape

LEAST = 1e-4  # a block's largest value counts as at least this: the engines' own convention for fp8
FLOAT8, FLOAT4 = 448.0, 6.0  # the largest values of float8_e4m3fn and float4_e2m1fn
LEAST_FLOAT8 = 2.0**-9  # the smallest value of float8_e4m3fn above zero
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6
BIAS = 127  # of an exponent in E8M0


def quantise(weight: torch.Tensor, recipe: Recipe, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantised matrix by name, on its device, without the scales of activations.

    weight: [rows, columns] of any float dtype; it is not rounded to another float before. largest: the largest absolute
    value of the matrices that have one scale of the whole; None for that of this matrix.

    For fp8 the values are bit for bit those of SGLang and vLLM (`per_block_cast_to_fp8`): the scale is the block's
    largest value over 448.
    """
    blocks = in_blocks(weight, recipe.block)
    most = blocks.abs().amax(dim=(1, 3), keepdim=True)
    found: dict[str, torch.Tensor] = {}
    match recipe.kind:
        case "fp8":
            scales = (most.clamp(LEAST) / FLOAT8).to(dtype_of(recipe))
            made = out_of_blocks(blocks * (1.0 / scales.float()), recipe.shape).to(torch.float8_e4m3fn)
        case "mxfp8":
            scales, factors = powers_of_two(most)
            made = out_of_blocks(blocks * factors, recipe.shape).to(torch.float8_e4m3fn)
            scales = scales.view(dtype_of(recipe))
        case "int8":
            scales = (most.clamp(LEAST) / 127.0).to(dtype_of(recipe))
            made = out_of_blocks((blocks / scales.float()).round_().clamp_(-127, 127), recipe.shape).to(torch.int8)
        case "int4":
            scales = (most.clamp(LEAST) / 7.5).to(dtype_of(recipe))
            made = pack(out_of_blocks((blocks / scales.float()).round_().clamp_(-8, 7), recipe.shape))
            found[f"{recipe.stem}weight_shape"] = torch.tensor(recipe.shape, device=weight.device)
        case "nvfp4":
            divisor = global_divisor(most.max() if largest is None else largest)
            scales = (most / FLOAT4 * divisor).clamp_(LEAST_FLOAT8, FLOAT8).to(torch.float8_e4m3fn)
            made = pack_float4(out_of_blocks(blocks / (scales.float() / divisor), recipe.shape))
            whole = divisor if recipe.whole == "weight_global_scale" else 1.0 / divisor
            found[f"{recipe.stem}{recipe.whole}"] = whole.reshape(recipe.whole_shape)
    return {recipe.weight: made, f"{recipe.stem}{recipe.scale}": scales.reshape(recipe.scale_shape), **found}


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the scales."""
    dtype: torch.dtype = getattr(torch, recipe.scale_dtype)
    return dtype


def powers_of_two(most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales for MXFP8 as E8M0 in uint8, and what to multiply the weights by.

    A scale is the smallest power of two by which the block's largest value `most` is at most 448, as vLLM computes it
    (`mxfp8_e4m3_quantize`). The specification of OCP would round down, and cut off the largest values.
    """
    least = torch.finfo(torch.float32).tiny
    fraction, exponent = torch.frexp(most.clamp(least) / FLOAT8)  # fraction * 2**exponent, and 0.5 <= fraction < 1
    stored = (exponent - (fraction == 0.5).to(exponent.dtype) + BIAS).clamp_(0, 2 * BIAS)
    return stored.to(torch.uint8), torch.ldexp(torch.ones_like(most), BIAS - stored)


def global_divisor(largest: torch.Tensor) -> torch.Tensor:
    """Return what the scales of NVFP4 are divided by again: it makes that of the largest value 448, the largest one."""
    divisor = FLOAT8 * FLOAT4 / largest.float()
    return torch.where(torch.isfinite(divisor), divisor, 1.0)


def largest_of(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest absolute value of several matrices on one device."""
    return torch.stack([weight.abs().amax().float() for weight in weights]).amax()


def in_blocks(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return a matrix as [blocks down, rows, blocks across, columns] float32, with zeros where a block is not full."""
    (height, width), (rows, columns) = weight.shape, block
    down, across = -(-height // rows), -(-width // columns)
    if (down * rows, across * columns) != (height, width):
        weight = torch.nn.functional.pad(weight, (0, across * columns - width, 0, down * rows - height))
    return weight.float().reshape(down, rows, across, columns)


def out_of_blocks(blocks: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return a matrix of this shape from its blocks: the inverse of `in_blocks`."""
    down, rows, across, columns = blocks.shape
    return blocks.reshape(down * rows, across * columns)[: shape[0], : shape[1]].contiguous()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return integers from -8 to 7, [rows, columns], as [rows, columns / 8] int32, in compressed-tensors' order."""
    fields = (weight.to(torch.int32) + 8).reshape(weight.shape[0], -1, PACKED["int4"])
    packed = torch.zeros(fields.shape[:2], dtype=torch.int32, device=weight.device)
    for place in range(PACKED["int4"]):
        packed |= fields[:, :, place] << (4 * place)
    return packed


def pack_float4(weight: torch.Tensor) -> torch.Tensor:
    """Round to float4_e2m1fn and return two in a byte, the first in the lower half: [rows, columns / 2] uint8.

    A value in the middle of two goes to the one whose last bit is zero. Values above 6 become 6.
    """
    middles = torch.tensor(MIDDLES, device=weight.device)
    size = weight.abs()
    # They differ for a value in the middle: there they are the numbers of its two neighbours.
    lower, upper = (
        torch.bucketize(size, middles, out_int32=True, right=side).to(torch.uint8) for side in (False, True)
    )
    codes = torch.where(lower % 2 == 0, lower, upper) | (torch.signbit(weight).to(torch.uint8) << 3)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
