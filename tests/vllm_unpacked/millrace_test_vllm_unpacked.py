"""A plugin for vLLM that keeps linear layers on the CPU as they were loaded, as on GPUs.

vLLM itself does that on CPUs for which it has no oneDNN. vLLM finds the plugin if this folder is on the server's
PYTHONPATH.
"""


def install() -> None:
    """Have vLLM find no kernel that packs weights. vLLM calls this in each of its processes."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
