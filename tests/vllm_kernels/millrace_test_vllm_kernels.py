"""A plugin for vLLM that computes quantised layers on any CPU.

vLLM's kernels for fp8 in blocks need a CPU with AMX. Its emulations of MXFP8 and NVFP4 are torch functions, which vLLM
lists for GPUs only. With this plugin, vLLM's own code loads and processes the weights, and only the kernels are others.
vLLM finds it if this folder is on the server's PYTHONPATH.
"""


def install() -> None:
    """List the kernels for the CPU. vLLM calls this in each of its processes."""
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm import BlockScaledMMLinearKernel as blocks
    from vllm.platforms.interface import PlatformEnum

    class TestFp8BlockKernel(blocks.Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
        """Multiplies with dequantised weights, without rounding the activations."""

        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(
            self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
        ) -> torch.Tensor:  # fmt: skip
            rows, columns = self.weight_group_shape
            wide = Bs.repeat_interleave(rows, 0)[: B.shape[0]].repeat_interleave(columns, 1)[:, : B.shape[1]]
            return torch.nn.functional.linear(A, (B.float() * wide).to(A.dtype))

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(TestFp8BlockKernel)
    linear.register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
