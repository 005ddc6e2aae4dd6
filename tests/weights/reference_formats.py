"""Quantises matrices by the code of vLLM and of compressed-tensors. It runs in vLLM's environment.

    python reference_formats.py GIVEN.safetensors MADE.safetensors

The NVFP4 matrices have one global scale, as those of a fused layer have.
"""

import sys

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch

given = load_file(sys.argv[1])
made: dict[str, torch.Tensor] = {}
arguments = QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=torch.float8_e4m3fn
)
scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
whole = generate_gparam(
    torch.stack([weight.amin() for weight in given.values()]).amin(),
    torch.stack([weight.amax() for weight in given.values()]).amax(),
)
for name, weight in given.items():
    values, scales = _mxfp8_e4m3_quantize_torch(weight)
    made |= {f"{name}.mxfp8.weight": values, f"{name}.mxfp8.weight_scale": scales}
    blocks = weight.reshape(len(weight), -1, 16)
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=whole)
    parts = {"weight": weight, "weight_scale": scales, "weight_global_scale": whole}
    made |= {f"{name}.nvfp4.{key}": one.clone() for key, one in NVFP4PackedCompressor.compress(parts, scheme).items()}
save_file(made, sys.argv[2])
