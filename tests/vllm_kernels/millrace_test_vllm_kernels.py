"""A plugin for vLLM that computes quantised layers on any CPU.

vLLM's kernels for fp8 in blocks need a CPU with AMX. Its emulations of MXFP8 and NVFP4 are torch functions, which vLLM
lists for GPUs only, and those of experts end in a kernel in Triton. With this plugin, vLLM's own code loads and
processes the weights, and only the kernels are others. vLLM finds it if this folder is on the server's PYTHONPATH.
"""

from typing import Any

import torch


def install() -> None:
    """List the kernels for the CPU. vLLM calls this in each of its processes."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm import BlockScaledMMLinearKernel as blocks
    from vllm.model_executor.layers.fused_moe.experts import nvfp4_emulation_moe, triton_moe
    from vllm.platforms.interface import PlatformEnum

    class TestFp8BlockKernel(blocks.Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
        """Multiplies with dequantised weights, without rounding the activations."""

        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(
            self,
            A: torch.Tensor,
            B: torch.Tensor,
            As: torch.Tensor,
            Bs: torch.Tensor,
        ) -> torch.Tensor:
            rows, columns = self.weight_group_shape
            wide = Bs.repeat_interleave(rows, 0)[: B.shape[0]].repeat_interleave(columns, 1)[:, : B.shape[1]]
            return torch.nn.functional.linear(A, (B.float() * wide).to(A.dtype))

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(TestFp8BlockKernel)
    linear.register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    triton_moe.TritonExperts.apply = experts
    nvfp4 = nvfp4_emulation_moe.Nvfp4QuantizationEmulationTritonExperts
    nvfp4._supports_current_device = staticmethod(lambda: True)
    nvfp4.apply = experts_in_nvfp4


def experts(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **_: object,
) -> None:
    """vLLM's `TritonExperts.apply` for SiLU experts that are not quantised, and all on this rank."""
    made = torch.zeros_like(hidden_states)
    for expert in range(len(w1)):
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(hidden_states[tokens], w1[expert]).chunk(2, -1)
        part = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
        made.index_add_(0, tokens, part * topk_weights[tokens, places, None].to(part.dtype))
    output.copy_(made)


def experts_in_nvfp4(
    self: Any, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, **others: Any
) -> None:
    """vLLM's emulation of experts in NVFP4, without rounding the activations."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    config, dtype = self.quant_config, hidden_states.dtype
    first = dequantize_to_dtype(w1, self.w1_scale_val, config.g1_alphas, dtype, swizzle=False)
    second = dequantize_to_dtype(w2, self.w2_scale_val, config.g2_alphas, dtype, swizzle=False)
    experts(self, output, hidden_states, first, second, **others)
