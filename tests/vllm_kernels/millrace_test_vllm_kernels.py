"""A plugin for vLLM that lets its emulations of MXFP8 and NVFP4 run on the CPU.

vLLM has them for GPUs that lack a kernel, and does not list them for CPUs. They are torch functions that run there too.
vLLM finds the plugin if this folder is on the server's PYTHONPATH.
"""


def install() -> None:
    """List the emulations for the CPU. vLLM calls this in each of its processes."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.platforms.interface import PlatformEnum

    register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
