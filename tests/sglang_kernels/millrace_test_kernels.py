"""A plugin for SGLang that computes quantised layers with torch.

On the CPU, SGLang computes them by AMX kernels of a package that PyPI does not have, and refuses to start without.
With this plugin, SGLang's own code loads and processes the weights as on a GPU, and only the kernels are others. SGLang
finds the plugin if this folder is on the server's PYTHONPATH.
"""

from typing import Any

import torch


def install() -> None:
    """Install the kernels. SGLang calls this in each of its processes."""
    from sglang.srt.layers.quantization import fp8

    fp8._is_cpu = False
    fp8.dispatch_w8a8_block_fp8_linear = lambda **_: linear
    fp8.apply_fp8_linear = linear_of_tensor
    fp8.Fp8MoEMethod.apply = experts


def dequantised(weight: torch.Tensor, scales: torch.Tensor, block: list[int]) -> torch.Tensor:
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]


def linear(
    *, input: torch.Tensor, weight: torch.Tensor, block_size: list[int], weight_scale: torch.Tensor,
    input_scale: None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """SGLang's `w8a8_block_fp8_linear`, without rounding the activations."""
    assert input_scale is None
    return torch.nn.functional.linear(input, dequantised(weight, weight_scale, block_size).to(input.dtype), bias)


def linear_of_tensor(
    input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    """SGLang's `apply_fp8_linear`, without rounding the activations. The weight is [columns, rows]."""
    return torch.nn.functional.linear(input, (weight.float() * weight_scale).t().to(input.dtype), bias)


def experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """SGLang's `Fp8MoEMethod.apply` for SiLU experts with scales for blocks."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, block = dispatch_output.hidden_states, self.quant_config.weight_block_size
    weights, chosen, _ = dispatch_output.topk_output
    first = dequantised(layer.w13_weight, layer.w13_weight_scale_inv, block).to(x.dtype)
    second = dequantised(layer.w2_weight, layer.w2_weight_scale_inv, block).to(x.dtype)
    made = torch.zeros_like(x)
    for expert in range(len(first)):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[tokens], first[expert]).chunk(2, -1)
        part = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, second[expert])
        made.index_add_(0, tokens, part * weights[tokens, places, None].to(x.dtype))
    return StandardCombineInput(hidden_states=made)
